// What a screen reader hears, and the notes that slide in at the edge.

import { byId, focusContent, h } from './dom.js'

/** Say it when the reader pauses. An answer is said block by block as blocks are whole, not token by token. */
export function say(words) {
  const live = byId('live')
  live.append(h('p', {}, words))
  while (live.childElementCount > 4) live.firstChild.remove()
}

/** Say it at once. */
export function alarm(words) {
  byId('alert').textContent = words
}

/** A note that stays until it is closed, or for `seconds`. `action` is [label, function]. */
export function notice(words, { action = null, seconds = 0, isError = false } = {}) {
  const close = () => {
    const hadFocus = note.contains(document.activeElement)
    note.remove()
    if (hadFocus) focusContent()
  }
  const note = h('div', { class: isError ? 'notice error' : 'notice' }, h('p', {}, words))
  if (action) {
    const [label, act] = action
    note.append(h('button', { type: 'button', onclick: () => (close(), act()) }, label))
  }
  note.append(h('button', { type: 'button', class: 'icon close', 'aria-label': 'Close this note', onclick: close }, '×'))
  byId('notices').append(note)
  if (isError) alarm(words)
  else say(words)
  // nobody is hurried: a note under the pointer or with the focus stays
  const expire = () => (note.matches(':hover, :focus-within') ? setTimeout(expire, 2000) : close())
  if (seconds) setTimeout(expire, seconds * 1000)
}
