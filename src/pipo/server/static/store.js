// Conversations in localStorage, one key each: two tabs that write do not undo each other's, and no index can go wrong.

const PREFIX = 'pipo:v1:conversation:'
const FORMAT = 'pipo-conversations'
const VERSION = 1

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('')

export function newConversation() {
  const now = Date.now()
  return { id: newId(), title: '', created: now, updated: now, system: '', messages: [] }
}

export const newMessage = (role, content = '') => ({ id: newId(), role, content, reasoning: '', state: 'done', error: '', meta: {} })

const text = (value, fallback = '') => (typeof value === 'string' ? value : fallback)
const number = (value, fallback) => (Number.isFinite(value) ? value : fallback)

/** A message of a file or of storage, field by field. Throws where it is none. `running` is what an answer that was being written is now:
 *  it ended with its page, unless another tab writes it. */
function readMessage(raw, running) {
  if (raw === null || typeof raw !== 'object') throw new Error('a message is not an object')
  if (raw.role !== 'user' && raw.role !== 'assistant') throw new Error(`a message has role ${JSON.stringify(raw.role)}, wanted "user" or "assistant"`)
  if (typeof raw.content !== 'string') throw new Error('a message has no text')
  const message = newMessage(raw.role, raw.content)
  message.id = text(raw.id) || message.id
  message.reasoning = text(raw.reasoning)
  message.error = text(raw.error)
  message.state = ['running', 'elsewhere'].includes(raw.state) ? running : ['done', 'stopped', 'failed'].includes(raw.state) ? raw.state : 'done'
  for (const [name, value] of Object.entries(raw.meta ?? {})) {
    if (Number.isFinite(value) || typeof value === 'string') message.meta[name] = value
  }
  return message
}

function readConversation(raw, running = 'stopped') {
  if (raw === null || typeof raw !== 'object' || !Array.isArray(raw.messages)) throw new Error('a conversation has no messages')
  const now = Date.now()
  return {
    id: /^[\w-]{1,64}$/.test(raw.id) ? raw.id : newId(),
    title: text(raw.title),
    created: number(raw.created, now),
    updated: number(raw.updated, now),
    system: text(raw.system),
    messages: raw.messages.map((message) => readMessage(message, running)),
  }
}

export const titleOf = (conversation) => {
  const first = conversation.messages.find((message) => message.role === 'user')
  const line = (conversation.title || first?.content || '').trim().split('\n', 1)[0]
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || 'New conversation'
}

/** `onProblem(words)` hears what could not be kept or read. */
export class Store {
  constructor(onProblem) {
    this.onProblem = onProblem
    this.conversations = new Map()
    this.isFull = false
  }

  load() {
    let numUnreadable = 0
    for (const key of this.keys()) {
      try {
        const conversation = readConversation(JSON.parse(localStorage.getItem(key)))
        conversation.id = key.slice(PREFIX.length)
        this.conversations.set(conversation.id, conversation)
      } catch {
        numUnreadable += 1 // left where it is
      }
    }
    if (numUnreadable) this.onProblem(`${numUnreadable} kept conversation${numUnreadable > 1 ? 's' : ''} could not be read and stayed untouched.`)
  }

  keys() {
    try {
      return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))
    } catch {
      this.onProblem('This browser lets the page keep nothing: conversations end with the tab. Export saves them.')
      return []
    }
  }

  /** Newest first. */
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated)
  }

  /** Keep it. What does not fit stays in memory, and is said once until something fits again. */
  save(conversation) {
    this.conversations.set(conversation.id, conversation)
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation))
      this.isFull = false
    } catch (error) {
      if (!this.isFull) {
        const why = error.name === 'QuotaExceededError' ? 'The browser has no room for more conversations' : `The browser keeps nothing (${error.message})`
        this.onProblem(`${why}: this one lasts as long as the tab. Export saves all of them to a file; deleting old ones makes room.`)
      }
      this.isFull = true
    }
  }

  remove(id) {
    this.conversations.delete(id)
    try {
      localStorage.removeItem(PREFIX + id)
    } catch {
      // it was never kept
    }
  }

  /** What another tab did, from a storage event. Returns the id, or null where it concerns no conversation. */
  takeEvent(event) {
    if (!event.key?.startsWith(PREFIX)) return null
    const id = event.key.slice(PREFIX.length)
    if (event.newValue === null) {
      this.conversations.delete(id)
      return id
    }
    try {
      const conversation = readConversation(JSON.parse(event.newValue), 'elsewhere')
      conversation.id = id
      this.conversations.set(id, conversation)
      return id
    } catch {
      return null
    }
  }

  export() {
    return JSON.stringify({ format: FORMAT, version: VERSION, conversations: this.list() }, null, 1)
  }

  /** All or nothing. Returns how many were new; throws Error with words for the reader. */
  import(json) {
    let raw
    try {
      raw = JSON.parse(json)
    } catch {
      throw new Error('This file is not JSON.')
    }
    if (raw?.format !== FORMAT || !Array.isArray(raw.conversations)) throw new Error(`This file holds no conversations of pipo: wanted "format": "${FORMAT}".`)
    if (raw.version !== VERSION) throw new Error(`This file has version ${JSON.stringify(raw.version)}, this page reads version ${VERSION}.`)
    const read = raw.conversations.map((one) => {
      try {
        return readConversation(one)
      } catch (error) {
        throw new Error(`This file cannot be used: ${error.message}.`)
      }
    })
    return read.filter((conversation) => this.takeImported(conversation)).length
  }

  takeImported(conversation) {
    const here = this.conversations.get(conversation.id)
    if (here && JSON.stringify(here.messages) === JSON.stringify(conversation.messages)) return false
    if (here) conversation.id = newId() // both stay
    this.save(conversation)
    return true
  }
}
