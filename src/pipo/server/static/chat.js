// Conversations and answers: what is sent, what comes back, and what is taken away again.

import { ApiError, getStats, streamChat } from './api.js'
import { alarm, notice, say } from './announce.js'
import { focusContent } from './dom.js'
import { count, few, seconds } from './format.js'
import { newConversation, newMessage } from './store.js'
import { TurnView } from './turn.js'

const SAVE_MS = 1000

/** `page`: {turns, empty, follower, sampling, store, onChange, askKey, modelId, answerName}. */
export class Chat {
  constructor(page) {
    this.page = page
    this.running = new Map() // by conversation: pipo answers several over one sweep of the weights
    this.views = new Map()
    this.conversation = newConversation()
    this.isLeaving = false // the page is going away, which looks like a network that fails
  }

  get isRunning() {
    return this.running.has(this.conversation.id)
  }

  /** What has been asked of the open conversation is not answered yet, here or in another tab. Says so. */
  refuses() {
    if (this.isRunning) {
      say('The answer before is not finished.')
      return true
    }
    if (this.conversation.messages.at(-1)?.state !== 'elsewhere') return false
    notice('Another tab writes this answer: wait for its end, or stop it there. If that tab is gone, reload this page.', { seconds: 12 })
    return true
  }

  open(conversation) {
    const { turns, follower } = this.page
    const top = conversation.id === this.conversation.id ? follower.top : null
    const hadFocus = turns.contains(document.activeElement)
    this.conversation = conversation
    this.views.clear()
    turns.replaceChildren()
    for (const message of conversation.messages) this.addView(message)
    this.page.onChange()
    if (top === null) follower.toEnd()
    else follower.backTo(top)
    if (hadFocus) focusContent()
  }

  /** Another tab changed the open conversation: what did not change stays where it is. */
  takeOver(conversation) {
    const { messages } = conversation
    const shown = this.conversation.messages
    this.conversation = conversation
    if (shown.length > messages.length || shown.some((message, i) => message.id !== messages[i].id)) {
      this.open(conversation)
      return
    }
    for (const message of messages) {
      const view = this.views.get(message.id) ?? this.addView(message)
      view.message = message
      view.show()
    }
    this.page.onChange()
    this.page.follower.grow()
  }

  openNew() {
    this.open(newConversation())
  }

  addView(message) {
    const actions = { retry: (one) => this.retry(one), edit: (one) => this.edit(one), remove: (one) => this.remove(one) }
    const view = new TurnView(message, message.role === 'user' ? 'You' : this.page.answerName(), actions)
    this.views.set(message.id, view)
    this.page.turns.append(view.element)
    return view
  }

  save(conversation = this.conversation) {
    this.page.store.save(conversation)
  }

  /** Of an answer that goes on: a conversation deleted meanwhile stays deleted. */
  saveRun(conversation) {
    if (this.page.store.conversations.has(conversation.id)) this.save(conversation)
  }

  /** Returns false where nothing was sent, and says why. */
  send(text) {
    if (this.refuses() || !this.sampling()) return false
    const { conversation } = this
    const message = newMessage('user', text)
    conversation.messages.push(message)
    this.addView(message)
    this.answer(conversation)
    return true
  }

  /** Fields of a request, or null after a word about what is wrong in them. */
  sampling() {
    try {
      return this.page.sampling.values()
    } catch (error) {
      notice(`Settings: ${error.message}`, { isError: true, seconds: 12 })
      return null
    }
  }

  async answer(conversation) {
    const fields = this.sampling()
    if (!fields) return
    const body = requestOf(conversation, this.page.modelId(), fields)
    const message = newMessage('assistant')
    message.state = 'running'
    const controller = new AbortController()
    const run = { controller, message, startedAt: performance.now(), numSaid: 0, saving: null }
    conversation.messages.push(message)
    conversation.updated = Date.now()
    this.running.set(conversation.id, run)
    this.addView(message)
    this.page.follower.toEnd()
    this.save(conversation)
    this.page.onChange()
    say('Answering.')
    const before = getStats(controller.signal).catch(() => null)
    try {
      for await (const chunk of streamChat(body, controller.signal)) this.take(conversation, run, chunk)
      message.state = 'done'
    } catch (error) {
      this.fail(message, error)
      if (error.status === 401) this.askKey(conversation, message, error)
    }
    delete message.meta.waiting
    this.running.delete(conversation.id)
    await this.end(conversation, run, await before)
  }

  take(conversation, run, chunk) {
    const { message, startedAt } = run
    const { meta } = message
    const now = performance.now()
    const choice = chunk.choices?.[0]
    const delta = choice?.delta ?? {}
    const thought = delta.reasoning_content ?? delta.reasoning ?? ''
    if (delta.content || thought) {
      run.firstAt ??= now
      delete meta.waiting
      meta.ttft_s ??= (now - startedAt) / 1000
      meta.decode_s = (now - run.firstAt) / 1000
      meta.num_pieces = (meta.num_pieces ?? 0) + 1
      message.content += delta.content ?? ''
      message.reasoning += thought
    }
    if (choice?.finish_reason) meta.finish = choice.finish_reason
    if (chunk.usage) takeUsage(meta, chunk.usage)
    this.saveSoon(conversation, run)
    this.showSoon(run)
  }

  /** What has come is kept within a second, also where the next word takes a minute. */
  saveSoon(conversation, run) {
    run.saving ??= setTimeout(() => {
      run.saving = null
      if (this.running.get(conversation.id) === run) this.saveRun(conversation)
    }, SAVE_MS)
  }

  /** At most once a frame: a fast model makes more pieces than a screen shows. */
  showSoon(run) {
    if (run.isDue) return
    run.isDue = true
    requestAnimationFrame(() => {
      run.isDue = false
      this.showRun(run)
    })
  }

  showRun(run) {
    const view = this.views.get(run.message.id)
    if (!view) return // another conversation is open
    const whole = view.show()
    const elements = [...view.body.children].slice(run.numSaid, whole.length)
    for (const element of elements) say(element.textContent)
    run.numSaid += elements.length
    this.page.follower.grow()
  }

  /** Before its first word an answer says what the engine does meanwhile. */
  showWaiting(engine) {
    for (const run of this.running.values()) {
      if (run.firstAt !== undefined) continue
      run.message.meta.waiting = waitingWords(engine, (performance.now() - run.startedAt) / 1000)
      this.showSoon(run)
    }
  }

  fail(message, error) {
    message.state = error.name === 'AbortError' || this.isLeaving ? 'stopped' : 'failed'
    if (message.state === 'stopped') return
    message.error = error instanceof ApiError ? error.message : `The page failed: ${error.message}`
    if (error.retryAfter) message.error += `\n\nThe server says: again in ${error.retryAfter} s.`
  }

  async end(conversation, run, before) {
    const { message } = run
    this.showRun(run)
    if (message.state === 'failed') this.tellFailure(message)
    say(message.state === 'done' ? `Answer complete, ${count(message.meta.completion_tokens ?? message.meta.num_pieces ?? 0)} tokens${speedWords(message.meta)}.` : 'The answer ended early.')
    this.saveRun(conversation)
    this.page.onChange()
    const after = before && (await getStats().catch(() => null))
    if (!after || after.uptime_s < before.uptime_s || !message.meta.num_pieces) return
    message.meta.bytes_streamed = after.engine.bytes_read - before.engine.bytes_read
    this.saveRun(conversation)
    this.views.get(message.id)?.show()
    this.page.follower.grow()
  }

  /** Where it is seen already it is only said. */
  tellFailure(message) {
    if (this.views.has(message.id)) alarm(message.error)
    else notice(message.error, { isError: true })
  }

  askKey(conversation, message, error) {
    this.page.askKey(error.message, () => {
      if (conversation.messages.at(-1) === message) this.retryIn(conversation, message)
    })
  }

  stop() {
    this.running.get(this.conversation.id)?.controller.abort()
  }

  /** Ask for the same answer again; what stood there can be had back. */
  retry(message) {
    if (this.refuses() || !this.sampling()) return
    const undo = this.keepForUndo()
    this.retryIn(this.conversation, message)
    if (message.content) undo('The answer was replaced.')
  }

  retryIn(conversation, message) {
    conversation.messages.splice(conversation.messages.indexOf(message))
    if (conversation === this.conversation) this.open(conversation)
    this.answer(conversation)
  }

  retryLast() {
    const last = this.conversation.messages.at(-1)
    if (last?.role === 'assistant') this.retry(last)
    else if (last && !this.refuses()) this.answer(this.conversation)
  }

  async edit(message) {
    if (this.refuses()) return
    const text = await this.views.get(message.id).edit()
    const { conversation } = this // as another tab may have changed it
    const at = conversation.messages.findIndex(({ id }) => id === message.id)
    if (text === null || at === -1 || this.refuses() || !this.sampling()) return
    const undo = this.keepForUndo()
    conversation.messages.splice(at, Infinity, newMessage('user', text))
    this.open(conversation)
    this.answer(conversation)
    undo('Your message and what followed were replaced.')
  }

  editLast() {
    const last = this.conversation.messages.findLast((message) => message.role === 'user')
    if (last) this.edit(last)
  }

  /** A message of the user goes with its answer, an answer alone. */
  remove(message) {
    if (this.refuses()) return
    const undo = this.keepForUndo()
    const { messages } = this.conversation
    const at = messages.indexOf(message)
    const isPair = message.role === 'user' && messages[at + 1]?.role === 'assistant'
    messages.splice(at, isPair ? 2 : 1)
    this.save()
    this.open(this.conversation)
    undo(isPair ? 'The message and its answer were deleted.' : 'The message was deleted.')
  }

  /** Remembers the turns as they are; what it returns offers them back. */
  keepForUndo() {
    const { conversation } = this
    const messages = [...conversation.messages]
    return (words) => {
      const restore = () => {
        this.running.get(conversation.id)?.controller.abort()
        conversation.messages = messages
        this.save(conversation)
        this.open(conversation)
      }
      notice(words, { action: ['Undo', restore], seconds: 12 })
    }
  }

  removeConversation(conversation) {
    this.running.get(conversation.id)?.controller.abort()
    this.page.store.remove(conversation.id)
    if (conversation === this.conversation) this.openNew()
    this.page.onChange()
    const restore = () => {
      this.save(conversation)
      this.open(conversation)
    }
    notice('The conversation was deleted.', { action: ['Undo', restore], seconds: 12 })
  }
}

/** The body of a chat completion. Answers without a word are left out, and messages that then meet are joined:
 *  most chat templates want turns to alternate. */
function requestOf(conversation, model, fields) {
  const messages = conversation.system.trim() ? [{ role: 'system', content: conversation.system.trim() }] : []
  for (const { role, content } of conversation.messages) {
    if (!content) continue
    const last = messages.at(-1)
    if (last?.role === role) last.content += `\n\n${content}`
    else messages.push({ role, content })
  }
  return { ...(model ? { model } : {}), messages, stream: true, stream_options: { include_usage: true }, ...fields }
}

function waitingWords({ num_running, num_waiting, num_unread }, waited_s) {
  let words = num_running > 1 ? 'Reading prompts' : 'Reading the prompt'
  if (num_waiting) words = num_unread ? 'Waiting for a place, or reading the prompt' : 'Waiting for a place: others are being answered'
  else if (num_unread) words += `, ${count(num_unread)} tokens to go`
  return waited_s < 1 ? `${words}…` : `${words} · ${seconds(waited_s)}`
}

function takeUsage(meta, usage) {
  meta.prompt_tokens = usage.prompt_tokens
  meta.completion_tokens = usage.completion_tokens
  const cached = usage.prompt_tokens_details?.cached_tokens
  if (cached) meta.cached_tokens = cached
}

function speedWords({ completion_tokens: num, decode_s: time }) {
  return num > 1 && time > 0 ? `, ${few((num - 1) / time)} a second` : ''
}
