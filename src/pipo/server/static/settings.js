// Sampling fields. An empty one is not sent: the server's default holds, and stands in the field as a hint.

import { h } from './dom.js'

const KEY = 'pipo:v1:sampling'

// what GenerationRequest takes; `least` and `most` are its bounds
const FIELDS = [
  { name: 'temperature', label: 'Temperature', least: 0, step: 0.05, help: '0 always takes the likeliest token' },
  { name: 'top_p', label: 'Top p', least: 0, most: 1, step: 0.01, help: '1 keeps all' },
  { name: 'top_k', label: 'Top k', least: -1, step: 1, isWhole: true, help: '0 keeps all' },
  { name: 'min_p', label: 'Min p', least: 0, most: 1, step: 0.01, help: '0 keeps all' },
  { name: 'max_tokens', label: 'Most tokens', least: 1, step: 1, isWhole: true, none: 'no limit', help: 'Empty: until the model ends' },
  { name: 'seed', label: 'Seed', least: 0, step: 1, isWhole: true, none: 'drawn', help: 'Empty: another each time' },
  { name: 'repeat_penalty', label: 'Repeat penalty', least: 0.01, step: 0.05, help: '1 is off' },
  { name: 'presence_penalty', label: 'Presence penalty', step: 0.1, help: '0 is off' },
  { name: 'frequency_penalty', label: 'Frequency penalty', step: 0.1, help: '0 is off' },
]

export class Sampling {
  constructor(container) {
    this.inputs = new Map()
    for (const field of FIELDS) container.append(this.makeField(field))
    for (const [name, value] of Object.entries(kept())) if (this.inputs.has(name)) this.inputs.get(name).value = value
    this.checkAll()
  }

  makeField(field) {
    const id = `sampling-${field.name}`
    const input = h('input', { id, inputmode: 'decimal', autocomplete: 'off', spellcheck: 'false', placeholder: 'default', 'aria-describedby': `${id}-help` })
    input.addEventListener('input', () => this.onInput(field, input))
    this.inputs.set(field.name, input)
    return h('div', { class: 'field' }, h('label', { for: id }, field.label), input, h('small', { id: `${id}-help` }, field.help))
  }

  onInput(field, input) {
    this.check(field, input)
    const texts = Object.fromEntries([...this.inputs].map(([name, one]) => [name, one.value.trim()]).filter(([, text]) => text))
    try {
      localStorage.setItem(KEY, JSON.stringify(texts))
    } catch {
      // it holds for this tab
    }
  }

  check(field, input) {
    const words = problemOf(field, input.value.trim())
    input.setAttribute('aria-invalid', String(words !== null))
    const help = document.getElementById(`${input.id}-help`)
    if (help) help.textContent = words ?? field.help
  }

  checkAll() {
    for (const field of FIELDS) this.check(field, this.inputs.get(field.name))
  }

  /** What the server says its defaults are: {name: value}. */
  showDefaults(defaults) {
    for (const { name, none } of FIELDS) {
      const value = defaults[name]
      this.inputs.get(name).placeholder = value === undefined ? 'default' : value === null ? none : String(value)
    }
  }

  reset() {
    for (const input of this.inputs.values()) input.value = ''
    for (const field of FIELDS) this.onInput(field, this.inputs.get(field.name))
  }

  /** Fields of a request. Throws Error naming the first that cannot be sent. */
  values() {
    const values = {}
    for (const field of FIELDS) {
      const text = this.inputs.get(field.name).value.trim()
      if (!text) continue
      const words = problemOf(field, text)
      if (words) throw new Error(`${field.label}: ${words}.`)
      values[field.name] = Number(text)
    }
    return values
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {}
  } catch {
    return {}
  }
}

/** Words about a text that cannot be sent, else null. */
function problemOf(field, text) {
  if (text === '') return null
  const value = Number(text)
  if (!Number.isFinite(value)) return `${text.slice(0, 20)} is not a number`
  if (field.isWhole && !Number.isSafeInteger(value)) return 'wants a whole number'
  if (field.least !== undefined && value < field.least) return `wants ${field.least} or more`
  if (field.most !== undefined && value > field.most) return `wants ${field.most} or less`
  return null
}
