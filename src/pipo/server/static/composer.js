// The message field: grows with its text, Enter sends where there is a keyboard.

import { byId } from './dom.js'

const DRAFT = 'pipo:v1:draft'
const isTouch = matchMedia('(pointer: coarse) and (hover: none)') // there Enter is the only way to a new line

/** `onSend(text)` returns whether it was taken; `onEditLast()` is the arrow key in an empty field. */
export function setUpComposer(onSend, onEditLast) {
  const field = byId('prompt')
  const fit = () => {
    field.style.height = 'auto'
    field.style.height = `${field.scrollHeight}px`
  }
  const keep = () => {
    try {
      sessionStorage.setItem(DRAFT, field.value)
    } catch {
      // a draft that is lost on reload
    }
  }
  field.addEventListener('input', () => {
    fit()
    keep()
  })
  field.addEventListener('keydown', (event) => {
    if (event.isComposing) return
    if (event.key === 'Enter' && !event.shiftKey && !isTouch.matches) {
      event.preventDefault()
      byId('composer').requestSubmit()
    } else if (event.key === 'ArrowUp' && field.value === '') {
      event.preventDefault()
      onEditLast()
    }
  })
  byId('composer').addEventListener('submit', (event) => {
    event.preventDefault()
    const text = field.value.trim()
    if (!text || !onSend(text)) return
    field.value = ''
    fit()
    keep()
  })
  if (isTouch.matches) byId('keys-note').hidden = true
  try {
    field.value = sessionStorage.getItem(DRAFT) ?? ''
  } catch {
    // no draft
  }
  fit()
}
