// The list of conversations, and their way out of the browser and in again.

import { notice } from './announce.js'
import { byId, h } from './dom.js'
import { titleOf } from './store.js'

/** Draws the list. The open conversation is listed once it has a message. */
export function showList(chat, store) {
  const focused = document.activeElement?.closest?.('#conversations li')?.dataset.id
  const isRemove = document.activeElement?.classList.contains('remove')
  byId('conversations').replaceChildren(...store.list().map((conversation) => item(chat, conversation)))
  if (!focused) return
  const again = byId('conversations').querySelector(`li[data-id="${CSS.escape(focused)}"]`)
  if (again) again.querySelector(isRemove ? '.remove' : '.open').focus()
  else byId('new').focus()
}

function item(chat, conversation) {
  const title = titleOf(conversation)
  const isOpen = conversation.id === chat.conversation.id
  const open = h('button', { type: 'button', class: 'open', dir: 'auto', 'aria-current': isOpen ? 'true' : null, onclick: () => choose(chat, conversation) }, title)
  const remove = h('button', { type: 'button', class: 'icon remove', 'aria-label': `Delete: ${title}`, onclick: () => chat.removeConversation(conversation) }, '×')
  return h('li', { 'data-id': conversation.id, class: chat.running.has(conversation.id) ? 'running' : null }, open, remove)
}

function choose(chat, conversation) {
  if (location.hash === '#pipeline') location.hash = '#chat'
  chat.open(conversation)
  closeList()
}

export function openList() {
  byId('frame').classList.add('list-open')
  byId('open-list').setAttribute('aria-expanded', 'true')
  byId('new').focus()
}

export function closeList() {
  const isOpen = byId('frame').classList.contains('list-open')
  byId('frame').classList.remove('list-open')
  byId('open-list').setAttribute('aria-expanded', 'false')
  if (isOpen) byId('open-list').focus()
  return isOpen
}

export function setUpFiles(store, onImport) {
  byId('export').addEventListener('click', () => download(store.export()))
  byId('import').addEventListener('click', () => byId('import-file').click())
  byId('import-file').addEventListener('change', async (event) => {
    const [file] = event.target.files
    event.target.value = '' // the same file may be chosen again
    if (!file) return
    try {
      const num = store.import(await file.text())
      notice(num ? `${num} conversation${num > 1 ? 's' : ''} imported.` : 'All of these conversations are here already.', { seconds: 8 })
      onImport()
    } catch (error) {
      notice(error.message, { isError: true })
    }
  })
}

function download(json) {
  const url = URL.createObjectURL(new Blob([json], { type: 'application/json' }))
  h('a', { href: url, download: `pipo-conversations-${new Date().toISOString().slice(0, 10)}.json` }).click()
  setTimeout(() => URL.revokeObjectURL(url), 60_000)
}
