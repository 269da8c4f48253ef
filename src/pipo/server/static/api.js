// What is asked of the server, and its refusals in its own words.

import { eventData } from './sse.js'

const KEY = 'pipo:v1:key'
let key = ''
try {
  key = sessionStorage.getItem(KEY) ?? ''
} catch {
  // storage is switched off: the key lasts as long as the page
}

export const apiKey = () => key

export function setApiKey(value) {
  key = value.trim()
  try {
    if (key) sessionStorage.setItem(KEY, key)
    else sessionStorage.removeItem(KEY)
  } catch {
    // as above
  }
}

const ADVICE = {
  context_length_exceeded: 'Shorten the message, delete turns above it, begin a new conversation, or ask for fewer “Most tokens” in the settings. `pipo serve -c N` gives a longer context.',
}

/** `status` is 0 where no answer came, or where an answer broke off. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message)
    this.status = status
    this.retryAfter = retryAfter
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.body ? { 'Content-Type': 'application/json' } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) }
  let response
  try {
    response = await fetch(path, { ...options, headers, cache: 'no-store' })
  } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new ApiError('The server does not answer. Is `pipo serve` still running?')
  }
  if (!response.ok) throw await refusal(response)
  return response
}

async function refusal(response) {
  const text = await response.text().catch(() => '')
  return new ApiError(wordsOf(text) || `${response.status} ${response.statusText} ${text.slice(0, 300)}`.trim(), response.status, response.headers.get('Retry-After'))
}

/** The message of an error body: OpenAI's {error: {message, code}}, or a proxy's {detail}. Empty where there is none. */
function wordsOf(text) {
  try {
    const body = JSON.parse(text)
    return wordsOfError(body.error ?? body.detail ?? body.message)
  } catch {
    return ''
  }
}

/** What the server says, and what can be done about it here. */
function wordsOfError(error) {
  const words = error?.message ?? error ?? ''
  const text = typeof words === 'string' ? words : JSON.stringify(words)
  return [text, ADVICE[error?.code]].filter(Boolean).join('\n\n')
}

export const getStats = async (signal) => (await ask('stats', { signal })).json()

/** What the server takes where a request says nothing: {name: value}, null for none. */
export async function getDefaults() {
  const body = await (await ask('props')).json()
  return { max_tokens: null, seed: null, ...body.default_generation_settings?.params }
}

/** Ids of the models that the server has. */
export async function getModels() {
  const body = await (await ask('v1/models')).json()
  return (body.data ?? []).map((model) => model.id)
}

/** Yields chunks of a chat completion. Throws ApiError; AbortError once `signal` is aborted. */
export async function* streamChat(body, signal) {
  const response = await ask('v1/chat/completions', { method: 'POST', body: JSON.stringify(body), signal })
  let hasFinished = false
  try {
    for await (const data of eventData(response.body)) {
      if (data === '[DONE]') return
      const chunk = JSON.parse(data)
      if (chunk.error) throw new ApiError(wordsOfError(chunk.error), chunk.error.status ?? 0)
      hasFinished ||= chunk.choices?.some((choice) => choice.finish_reason) ?? false
      yield chunk
    }
  } catch (error) {
    if (error.name === 'AbortError' || error instanceof ApiError) throw error
    throw new ApiError(`The connection broke off: ${error.message}`)
  }
  if (!hasFinished) throw new ApiError('The connection ended before the answer did.')
}
