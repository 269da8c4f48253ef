// Puts the parts together.

import { notice } from './announce.js'
import { apiKey, getDefaults, getModels, setApiKey } from './api.js'
import { Chat } from './chat.js'
import { setUpComposer } from './composer.js'
import { byId, focusContent, h, setText } from './dom.js'
import { count, few, modelName, percent, rate, size } from './format.js'
import { setUpKeys } from './keys.js'
import { closeList, openList, setUpFiles, showList } from './list.js'
import { leadOf, PipelineView } from './pipeline.js'
import { readPlan } from './plan.js'
import { Follower } from './scroll.js'
import { Sampling } from './settings.js'
import { History, Poller } from './stats.js'
import { Store } from './store.js'
import { Sweep } from './sweep.js'

const OPEN = 'pipo:v1:open'

let stats = null
let models = []
const history = new History()

const store = new Store((words) => notice(words, { isError: true }))
const sampling = new Sampling(byId('sampling'))
const follower = new Follower(byId('log'), byId('latest'))
const strip = new Sweep(byId('strip-map'), { gap: 2 })
const pipeline = new PipelineView(byId('pipeline'))
const modelId = () => byId('model-choice').value || models[0] || ''
const answerName = () => modelName(modelId() || stats?.model || 'Model')

const chat = new Chat({ turns: byId('turns'), follower, sampling, store, onChange: showChat, askKey, modelId, answerName })

// ── chat ──

function showChat() {
  showList(chat, store)
  const { isRunning, conversation } = chat
  const focused = document.activeElement
  byId('stop').hidden = !isRunning
  byId('send').hidden = isRunning
  if (focused?.hidden) focusContent()
  byId('empty').hidden = conversation.messages.length > 0
  document.body.classList.toggle('is-empty', conversation.messages.length === 0)
  const last = conversation.messages.findLast((message) => message.meta.prompt_tokens !== undefined)
  const used = last ? last.meta.prompt_tokens + (last.meta.completion_tokens ?? 0) : 0
  const context = stats?.info?.context_tokens
  setText(byId('context-note'), used && context ? `${count(used)} of ${count(context)} tokens of context used` : '')
  byId('context-note').classList.toggle('tight', Boolean(context) && used > context * 0.85)
  try {
    sessionStorage.setItem(OPEN, conversation.id)
  } catch {
    // a reload begins with the newest
  }
}

function openFirst() {
  let id = null
  try {
    id = sessionStorage.getItem(OPEN)
  } catch {
    // as above
  }
  chat.open(store.conversations.get(id) ?? chat.conversation)
}

window.addEventListener('storage', (event) => {
  const id = store.takeEvent(event)
  if (id === null || chat.running.has(id)) return
  if (id === chat.conversation.id && store.conversations.has(id)) chat.takeOver(store.conversations.get(id))
  showList(chat, store)
})
window.addEventListener('pagehide', () => {
  chat.isLeaving = true
  for (const [id, { message }] of chat.running) {
    message.state = 'stopped'
    const conversation = store.conversations.get(id)
    if (conversation) store.save(conversation)
  }
})
window.addEventListener('pageshow', () => (chat.isLeaving = false))

function send(text) {
  showView('chat')
  return chat.send(text)
}

function startNew() {
  closeList()
  location.hash = '#chat'
  chat.openNew()
  byId('prompt').focus()
}

// ── views ──

function showView(name) {
  const isPipeline = name === 'pipeline'
  byId('pipeline').hidden = !isPipeline
  byId('chat').hidden = isPipeline
  document.body.classList.toggle('shows-pipeline', isPipeline)
  for (const [id, isHere] of [['to-chat', !isPipeline], ['to-pipeline', isPipeline]]) {
    if (isHere) byId(id).setAttribute('aria-current', 'page')
    else byId(id).removeAttribute('aria-current')
  }
  document.title = `${isPipeline ? 'Pipeline' : 'Chat'} · pipo`
  if (!isPipeline) follower.grow()
}

window.addEventListener('hashchange', () => {
  showView(location.hash.slice(1))
  byId(location.hash === '#pipeline' ? 'pipeline' : 'prompt').focus({ preventScroll: true })
})

// ── statistics ──

function takeStats(next) {
  const hasOtherModel = stats !== null && stats.model !== next.model
  const isFirst = stats === null
  stats = next
  history.add(next)
  chat.showWaiting(next.engine)
  const plan = readPlan(next.info)
  pipeline.show(next, plan, history)
  strip.setPlan(plan)
  byId('strip').classList.toggle('has-map', plan.units.length > 0)
  const now = history.now
  strip.setRate(history.sweepsPerS)
  byId('strip').classList.remove('is-down')
  setText(byId('strip-text'), stripWords(next.engine, plan, now))
  setText(byId('empty-lead'), leadOf(plan, next.engine))
  setText(byId('empty-sub'), next.info?.context_tokens ? `${modelName(next.model)} within ${size(next.engine.limit_bytes)} of memory, ${count(next.info.context_tokens)} tokens of context.` : '')
  showModel()
  if (isFirst || hasOtherModel) loadModels()
  if (isFirst) showChat() // the size of the context is known now
}

function stripWords(engine, plan, now) {
  const memory = `${size(engine.anonymous_bytes || sum(engine.ledger))} of ${size(engine.limit_bytes)}`
  if (!engine.num_running && !engine.num_waiting) return `At rest · ${memory}`
  const drive = plan.driveBytesPerS ? `, ${percent(now.bytes_read / plan.driveBytesPerS)} of the drive` : ''
  const waiting = engine.num_waiting ? `, ${engine.num_waiting} waiting` : ''
  return `${engine.num_running} running${waiting} · ${few(now.completion_tokens)} tok/s · ${rate(now.bytes_read)}${drive} · ${memory}`
}

const sum = (ledger) => Object.values(ledger ?? {}).reduce((total, bytes) => total + bytes, 0)

function takeTrouble(error) {
  strip.setRate(0)
  byId('strip').classList.toggle('is-down', error.status !== 503) // it is only not ready yet
  setText(byId('strip-text'), error.status === 401 ? 'The server asks for an API key' : error.message)
  pipeline.showTrouble(error.message)
  if (error.status === 401 && stats === null && !hasAsked) askKey(error.message)
}

async function loadModels() {
  models = await getModels().catch(() => [])
  sampling.showDefaults(await getDefaults().catch(() => ({})))
  const choice = byId('model-choice')
  const chosen = choice.value
  choice.replaceChildren(...models.map((id) => h('option', { value: id }, modelName(id))))
  if (models.includes(chosen)) choice.value = chosen
  byId('model-field').hidden = models.length < 2
  showModel()
}

function showModel() {
  const name = modelId() || stats?.model || ''
  setText(byId('model'), modelName(name))
  byId('model').title = name
}

// ── dialogs ──

let hasAsked = false

/** Ask for a key, with the server's words; `then` runs once there is one. */
function askKey(words, then = () => {}) {
  const dialog = byId('ask-key')
  if (dialog.open) return
  hasAsked = true
  setText(byId('ask-key-words'), words)
  const input = byId('ask-key-input')
  input.value = apiKey()
  dialog.returnValue = ''
  const onClose = () => {
    if (dialog.returnValue !== 'ok') return
    setApiKey(input.value)
    poller.start()
    loadModels()
    then()
  }
  dialog.addEventListener('close', onClose, { once: true })
  dialog.showModal()
  input.select()
}
byId('ask-key-cancel').addEventListener('click', () => byId('ask-key').close(''))

function openSettings() {
  byId('system').value = chat.conversation.system
  byId('api-key').value = apiKey()
  byId('settings').showModal()
}
byId('settings').addEventListener('close', () => {
  const system = byId('system').value
  if (system !== chat.conversation.system) {
    chat.conversation.system = system
    if (chat.conversation.messages.length) chat.save()
  }
  if (byId('api-key').value.trim() !== apiKey()) {
    setApiKey(byId('api-key').value)
    poller.start()
  }
  for (const view of chat.views.values()) view.show()
  showModel()
})
byId('settings-reset').addEventListener('click', () => sampling.reset())
for (const dialog of document.querySelectorAll('dialog')) {
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog) dialog.close('') // beside it
  })
}

function showTheme() {
  const words = `Colours: ${window.pipoTheme.choice === 'system' ? "as the system's" : window.pipoTheme.choice}`
  byId('theme').setAttribute('aria-label', words)
  byId('theme').title = words
}
function nextTheme() {
  window.pipoTheme.next()
  showTheme()
}

// ── wiring ──

byId('new').addEventListener('click', startNew)
byId('stop').addEventListener('click', () => chat.stop())
byId('theme').addEventListener('click', nextTheme)
byId('open-help').addEventListener('click', () => byId('help').showModal())
byId('open-settings').addEventListener('click', openSettings)
byId('open-list').addEventListener('click', () => closeList() || openList())
byId('frame').addEventListener('click', (event) => {
  if (event.target === byId('frame')) closeList() // the veil beside the list
})
byId('strip').addEventListener('click', (event) => {
  if (location.hash !== '#pipeline') return
  event.preventDefault()
  location.hash = '#chat'
})

setUpComposer(send, () => chat.editLast())
setUpFiles(store, showChat)
setUpKeys(
  [
    ['/', 'to the message field', () => (location.hash === '#pipeline' ? (location.hash = '#chat') : byId('prompt').focus())],
    ['n', 'new conversation', startNew],
    ['r', 'answer again', () => chat.retryLast()],
    ['1', 'chat', () => (location.hash = '#chat')],
    ['2', 'pipeline', () => (location.hash = '#pipeline')],
    [',', 'settings', openSettings],
    ['t', 'colours: system, light, dark', nextTheme],
    ['?', 'these shortcuts', () => byId('help').showModal()],
  ],
  () => closeList() || chat.stop(),
)

showTheme()
store.load()
openFirst()
showView(location.hash.slice(1))
const poller = new Poller(takeStats, takeTrouble)
if (location.hash !== '#pipeline' && matchMedia('(hover: hover)').matches) byId('prompt').focus()
