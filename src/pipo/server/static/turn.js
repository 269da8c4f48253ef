// One turn as it is seen: text, folded reasoning, what it cost, and what can be done with it.

import { h, setText } from './dom.js'
import { few, seconds, size, tokens } from './format.js'
import { update } from './markdown.js'

/** `actions`: {retry, edit, remove} take the message; an action that is null has no button. */
export class TurnView {
  constructor(message, name, actions) {
    this.message = message
    this.body = h('div', { class: 'body', dir: message.role === 'user' ? 'auto' : null })
    this.reasoning = null
    this.cost = h('p', { class: 'cost' })
    this.error = h('div', { class: 'turn-error', hidden: true })
    this.buttons = h('div', { class: 'actions' })
    this.element = h('article', { class: `turn ${message.role}`, 'aria-label': name, 'data-id': message.id }, h('h2', { class: 'who' }, name), h('div', { class: 'column' }, this.body, this.error, h('div', { class: 'foot' }, this.cost, this.buttons)))
    this.actions = actions
    this.show()
  }

  /** Bring the element up to the message. Returns blocks that are whole, for who reads them out. */
  show() {
    const { message } = this
    const isRunning = message.state === 'running' || message.state === 'elsewhere'
    this.element.classList.toggle('running', isRunning)
    this.element.setAttribute('aria-busy', String(isRunning))
    let blocks = []
    if (message.role === 'user') setText(this.body, message.content)
    else blocks = update(this.body, message.content)
    this.showReasoning(isRunning)
    this.showError()
    setText(this.cost, costOf(message))
    if (this.shownState !== message.state) this.showButtons()
    this.shownState = message.state
    return isRunning ? blocks.slice(0, -1) : blocks
  }

  showReasoning(isRunning) {
    const { reasoning, content } = this.message
    if (!reasoning) return
    if (!this.reasoning) {
      this.reasoning = { summary: h('summary'), text: h('div', { class: 'reasoning-text' }) }
      this.body.before(h('details', { class: 'reasoning' }, this.reasoning.summary, this.reasoning.text))
    }
    const numWords = reasoning.trim().split(/\s+/).length
    setText(this.reasoning.summary, isRunning && !content ? `Reasoning, ${numWords} words so far…` : `Reasoning, ${numWords} words`)
    update(this.reasoning.text, reasoning)
  }

  showError() {
    const { state, error, content } = this.message
    this.error.hidden = !error && state !== 'stopped'
    if (error) setText(this.error, error)
    else if (state === 'stopped') setText(this.error, content ? 'Stopped here.' : 'Stopped before a word came.')
    this.error.classList.toggle('is-error', Boolean(error))
  }

  showButtons() {
    const { message, actions } = this
    if (message.state === 'running' || message.state === 'elsewhere') {
      this.buttons.replaceChildren()
      return
    }
    const button = (label, act) => h('button', { type: 'button', onclick: () => act(this.message) }, label)
    const made = []
    if (message.role === 'assistant' && actions.retry) made.push(button(message.state === 'failed' ? 'Try again' : 'Answer again', actions.retry))
    if (message.role === 'user' && actions.edit) made.push(button('Edit', actions.edit))
    if (message.content) made.push(this.copyButton())
    made.push(button('Delete', actions.remove))
    this.buttons.replaceChildren(...made)
  }

  copyButton() {
    const button = h('button', { type: 'button' }, 'Copy')
    button.addEventListener('click', async () => {
      try {
        await navigator.clipboard.writeText(this.message.content)
        button.textContent = 'Copied'
      } catch {
        button.textContent = 'Select it to copy' // no clipboard without https
      }
      setTimeout(() => (button.textContent = 'Copy'), 1500)
    })
    return button
  }

  /** A field in the text's place. Resolves to the new text, or null when it is given up. */
  edit() {
    return new Promise((resolve) => {
      const field = h('textarea', { dir: 'auto', 'aria-label': 'Edit your message', rows: Math.min(12, this.message.content.split('\n').length + 1) })
      field.value = this.message.content
      const end = (text) => {
        form.replaceWith(this.body)
        this.element.classList.remove('editing')
        this.buttons.querySelector('button')?.focus()
        resolve(text)
      }
      const cancel = h('button', { type: 'button', onclick: () => end(null) }, 'Cancel')
      const form = h('form', { class: 'edit' }, field, h('div', { class: 'edit-row' }, cancel, h('button', { class: 'send' }, 'Send again')))
      form.addEventListener('submit', (event) => {
        event.preventDefault()
        if (field.value.trim()) end(field.value.trim())
      })
      field.addEventListener('keydown', (event) => {
        if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
          event.preventDefault()
          form.requestSubmit()
        } else if (event.key === 'Escape') {
          event.stopPropagation()
          end(null)
        }
      })
      this.body.replaceWith(form)
      this.element.classList.add('editing')
      field.focus()
    })
  }
}

/** What an answer cost, in a line. */
export function costOf({ role, state, meta }) {
  if (role !== 'assistant') return ''
  const parts = []
  const isRunning = state === 'running' || state === 'elsewhere'
  const about = meta.completion_tokens === undefined ? '≈ ' : '' // pieces, counted as they came
  const num = meta.completion_tokens ?? meta.num_pieces ?? 0
  if (isRunning && num === 0) return meta.waiting ?? 'Reading the prompt…'
  if (num) parts.push(about + tokens(num))
  const speed = meta.decode_s > 0 && num > 1 ? (num - 1) / meta.decode_s : 0
  if (speed) parts.push(`${about}${few(speed)} tok/s`)
  if (meta.ttft_s !== undefined && !isRunning) parts.push(`first after ${seconds(meta.ttft_s)}`)
  if (meta.prompt_tokens !== undefined) parts.push(`prompt ${tokens(meta.prompt_tokens)}${meta.cached_tokens ? `, ${tokens(meta.cached_tokens)} kept from before` : ''}`)
  if (meta.bytes_streamed) parts.push(`${size(meta.bytes_streamed)} of weights streamed`)
  if (state === 'elsewhere') parts.push('another tab writes it')
  if (meta.finish === 'length') parts.push('cut at the most tokens')
  return parts.join(' · ')
}
