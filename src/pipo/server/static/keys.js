// Shortcuts. Single keys work outside of fields only, and can be switched off (WCAG 2.1.4).

import { byId, h } from './dom.js'

const KEY = 'pipo:v1:single-keys'

const ALWAYS = [
  ['Enter', 'send the message'],
  ['Shift+Enter', 'a new line'],
  ['↑ in an empty field', 'edit your last message'],
  ['Esc', 'stop the answer, close what is open'],
]

/** `bindings`: [key, words, function]. `onEscape` returns nothing. */
export function setUpKeys(bindings, onEscape) {
  const box = byId('single-keys')
  box.checked = isOn()
  box.addEventListener('change', () => {
    try {
      localStorage.setItem(KEY, String(box.checked))
    } catch {
      // it holds for this tab
    }
  })
  const rows = [...ALWAYS, ...bindings.map(([key, words]) => [key, words])]
  byId('help-keys').tBodies[0].append(...rows.map(([key, words]) => h('tr', {}, h('th', { scope: 'row' }, h('kbd', {}, key)), h('td', {}, words))))
  const byKey = new Map(bindings.map(([key, , act]) => [key, act]))
  document.addEventListener('keydown', (event) => {
    if (document.querySelector('dialog[open]') || event.isComposing) return // a dialog closes itself
    if (event.key === 'Escape') onEscape()
    else if (box.checked && !event.ctrlKey && !event.metaKey && !event.altKey && !isField(event.target)) {
      const act = byKey.get(event.key)
      if (act) {
        event.preventDefault() // or the key lands in the field that it moves to
        act()
      }
    }
  })
}

const isField = (element) => element.closest?.('input, textarea, select, [contenteditable]') !== null

function isOn() {
  try {
    return localStorage.getItem(KEY) !== 'false'
  } catch {
    return true
  }
}
