// The pipeline as it runs: who holds the memory, what moves, what waits.

import { Sparkline, StackedBar } from './chart.js'
import { h, setText } from './dom.js'
import { count, few, percent, rate, seconds, size } from './format.js'
import { countHomes, homeWords } from './plan.js'
import { Sweep } from './sweep.js'

const CAUSES = { queue: 'waiting in the queue of reads', disk: 'waiting for the drive', repack: 'waiting for repacking', copy: 'waiting for the copy to the device' }
const LANES = { drive: 'the drive', upload: 'the link to the device', download: 'the link from the device', cpu: 'the CPU', device: 'the device' }
const HOLDERS = [
  ['resident weights', 'ram'],
  ['experts', 'ram'],
  ['adapters', 'ram'],
  ['slots', 'disk'],
  ['transfer buffers', 'disk'],
  ['KV cache', 'kv'],
  ['activations', 'work'],
  ['graphs', 'work'],
  ['process', 'process'],
  ['server', 'process'],
]

const section = (id, title, ...children) => h('section', { 'aria-labelledby': id }, h('h2', { id }, title), ...children)

export class PipelineView {
  constructor(root) {
    this.root = root
    this.shownAt = null
    this.map = h('canvas', { class: 'map', role: 'img' })
    this.mapRows = h('div', { class: 'map-rows', 'aria-hidden': 'true' })
    this.sweep = new Sweep(this.map, { gap: 3 })
    this.lead = h('p', { class: 'lead' })
    this.legend = h('ul', { class: 'legend' })
    this.memory = new StackedBar('Memory')
    this.memoryWords = h('p', { class: 'words' })
    this.device = new StackedBar('Device memory, as planned')
    this.deviceSection = section('p-device', 'Device', this.device.element)
    this.time = new StackedBar('Where a second goes')
    this.timeWords = h('p', { class: 'words' })
    this.sparks = [
      { spark: new Sparkline('Tokens out', 'ink', (value) => `${few(value)}/s`), of: (rates) => rates.completion_tokens },
      { spark: new Sparkline('Tokens in', 'ink', (value) => `${few(value)}/s`), of: (rates) => rates.prompt_tokens },
      { spark: new Sparkline('From the drive', 'disk', rate), of: (rates) => rates.bytes_read, isDrive: true },
      { spark: new Sparkline('Computing', 'compute', percent, { top: 1 }), of: (rates) => rates.compute_s },
    ]
    this.facts = h('dl', { class: 'facts' })
    this.factValues = new Map()
    this.expected = h('dl', { class: 'facts' })
    this.expectedValues = new Map()
    this.helps = h('ul', { class: 'helps' })
    this.trouble = h('p', { class: 'trouble', role: 'status', hidden: true })
    root.append(
      this.trouble,
      h('div', { class: 'hero' }, this.lead, h('div', { class: 'map-frame' }, this.mapRows, this.map), this.legend),
      section('p-rates', 'The last two minutes', h('div', { class: 'sparks' }, ...this.sparks.map(({ spark }) => spark.element))),
      h('div', { class: 'pair' }, section('p-memory', 'Memory against the budget', this.memoryWords, this.memory.element), section('p-time', 'Where a second goes', this.timeWords, this.time.element)),
      this.deviceSection,
      h('div', { class: 'pair' }, section('p-requests', 'Requests', this.facts), section('p-plan', 'Planned and found', this.expected, this.helps)),
    )
  }

  /** `plan` is of readPlan. */
  show(stats, plan, history) {
    this.trouble.hidden = true
    this.root.classList.remove('is-stale')
    this.shownAt = new Date()
    const now = history.now
    this.showMap(plan, stats.engine, history)
    this.showSparks(plan, history, now)
    this.showMemory(stats.engine, plan)
    this.showTime(now, stats.engine)
    this.showRequests(stats)
    this.showPlan(plan, stats.engine, now)
  }

  showTrouble(words) {
    this.trouble.hidden = false
    this.root.classList.toggle('is-stale', Boolean(this.shownAt))
    setText(this.trouble, this.shownAt ? `${words} These are the figures of ${this.shownAt.toLocaleTimeString()}.` : words)
    this.sweep.setRate(0)
  }

  showMap(plan, engine, history) {
    setText(this.lead, leadOf(plan, engine))
    this.sweep.setPlan(plan)
    this.sweep.setRate(history.sweepsPerS)
    const words = mapWords(plan.units)
    if (this.mapShown === words) return
    this.mapShown = words
    this.map.setAttribute('aria-label', words)
    this.map.parentElement.hidden = plan.units.length === 0
    this.mapRows.replaceChildren(...this.sweep.map.rows.map((row) => h('span', {}, row)))
    this.map.classList.toggle('tall', this.sweep.map.rows.length > 2)
    this.legend.replaceChildren(...legendOf(plan))
  }

  showSparks(plan, history, now) {
    for (const { spark, of, isDrive } of this.sparks) {
      if (isDrive && plan.driveBytesPerS) spark.note = ` · now ${percent(now.bytes_read / plan.driveBytesPerS)} of ${rate(plan.driveBytesPerS)}`
      spark.show(history.intervals, history.last.now, of, of(now))
    }
  }

  showMemory(engine, plan) {
    const limit = engine.limit_bytes || 1
    const entries = orderedLedger(engine.ledger ?? {})
    const held = entries.reduce((sum, [, , bytes]) => sum + bytes, 0)
    const parts = entries.map(([name, tone, bytes]) => ({ name, tone, share: bytes / limit, words: size(bytes) }))
    if (held < limit) parts.push({ name: 'not taken', tone: 'none', share: (limit - held) / limit, words: size(limit - held) })
    const marks = []
    if (engine.anonymous_bytes) marks.push({ name: 'measured now', words: size(engine.anonymous_bytes), share: engine.anonymous_bytes / limit })
    this.memory.show(parts, marks)
    const measured = engine.anonymous_bytes ? ` The processes measure ${size(engine.anonymous_bytes)} (the tick), ${size(engine.peak_bytes)} at most.` : ''
    setText(this.memoryWords, `${size(held)} of ${size(engine.limit_bytes)} are spoken for.${measured}`)
    this.showDevice(plan.device)
  }

  showDevice(device) {
    this.deviceSection.hidden = !device
    if (!device) return
    const limit = device.limit_bytes || 1
    this.device.show(orderedLedger(device.breakdown_bytes ?? {}).map(([name, tone, bytes]) => ({ name, tone: tone === 'ram' ? 'device' : tone, share: bytes / limit, words: size(bytes) })))
  }

  showTime(now, engine) {
    const stalls = Object.keys({ ...engine.stall_s, ...now.stalls }).map((cause, i) => ({ name: CAUSES[cause] ?? `waiting: ${cause}`, tone: `stall-${i % 4}`, share: now.stalls[cause] ?? 0 }))
    const waited = stalls.reduce((sum, part) => sum + part.share, 0)
    const rest = Math.max(0, now.wall_s - now.compute_s - waited)
    const parts = [{ name: 'computing', tone: 'compute', share: now.compute_s }, ...stalls, { name: 'other work in a pass', tone: 'work', share: rest }, { name: engine.num_running ? 'between passes' : 'nothing to do', tone: 'none', share: Math.max(0, 1 - now.wall_s) }]
    this.time.show(parts.map((part) => ({ ...part, words: percent(part.share) })))
    const wall = now.wall_s
    setText(this.timeWords, wall > 0.005 ? `Passes take ${percent(Math.min(1, wall))} of the time; within them compute waits for ${percent(Math.min(1, waited / wall))}.` : 'No pass runs now.')
  }

  showRequests({ engine, info, uptime_s }) {
    const places = info.num_sequences ? ` of ${info.num_sequences} places` : ''
    facts(this.facts, this.factValues, [
      ['Being answered', `${engine.num_running}${places}`],
      ['Waiting', count(engine.num_waiting)],
      ['Tokens written', count(engine.completion_tokens)],
      ['Tokens read', engine.cached_tokens ? `${count(engine.prompt_tokens)}, ${count(engine.cached_tokens)} of them kept from before` : count(engine.prompt_tokens)],
      ['Passes', count(engine.num_passes)],
      ['Weights read', size(engine.bytes_read)],
      ['Context', `${count(info.context_tokens ?? 0)} tokens`],
      ['Up for', seconds(uptime_s)],
    ])
  }

  showPlan(plan, engine, now) {
    const rows = []
    const { prediction, machine } = plan
    const perPass = engine.num_passes ? engine.bytes_read / engine.num_passes : null
    rows.push(['Streamed in a pass', `${size(plan.streamedBytes)} planned${perPass === null ? '' : `, ${size(perPass)} found`}`])
    if (prediction) rows.push(['Tokens a second', `${few(prediction.tokens_per_s)} planned${plan.workload ? ` for ${plan.workload.num_sequences} at a time` : ''}, ${few(now.completion_tokens)} now`])
    const lane = prediction?.limit?.lane
    if (lane) rows.push(['What limits it', `${LANES[lane] ?? lane}, busy for ${percent(prediction.busy?.[lane] ?? 1)} of decode`])
    if (machine?.name) rows.push(['Machine', [machine.name, machine.source].filter(Boolean).join(', ')])
    facts(this.expected, this.expectedValues, rows)
    const helping = plan.changes.filter((change) => change.gain >= 0.01).slice(0, 4)
    const key = JSON.stringify(helping)
    if (key === this.helpsShown) return
    this.helpsShown = key
    this.helps.replaceChildren(...helping.map((change) => h('li', {}, h('strong', {}, `+${percent(change.gain)}`), ` ${change.what}`)))
  }
}

/** A list of terms whose values change while the terms stay. */
function facts(list, values, rows) {
  const names = rows.map(([name]) => name).join('\n')
  if (list.dataset.names !== names) {
    values.clear()
    list.dataset.names = names
    list.replaceChildren(
      ...rows.map(([name]) => {
        values.set(name, h('dd'))
        return h('div', {}, h('dt', {}, name), values.get(name))
      }),
    )
  }
  for (const [name, value] of rows) setText(values.get(name), value)
}

/** [name, tone, bytes], known holders in their order, others by size. */
function orderedLedger(ledger) {
  const place = (name) => {
    const at = HOLDERS.findIndex(([known]) => known === name)
    return at === -1 ? HOLDERS.length : at
  }
  return Object.entries(ledger)
    .filter(([, bytes]) => bytes > 0)
    .sort(([a, x], [b, y]) => place(a) - place(b) || y - x)
    .map(([name, bytes]) => [name, HOLDERS[place(name)]?.[1] ?? 'work', bytes])
}

/** What is special about this model on this budget. Weights also lie where keys and values will, while the context is short. */
export function leadOf({ weightBytes, residentBytes, streamedBytes }, engine) {
  if (!weightBytes) return 'The plan is not known yet.'
  if (!streamedBytes) return `All ${size(weightBytes)} of weights stay in memory.`
  const lent = Math.min((engine.ledger?.['resident weights'] ?? 0) - residentBytes, streamedBytes)
  if (residentBytes && lent >= streamedBytes * 0.02) {
    const more = `${size(weightBytes - streamedBytes)} stay in memory, and ${size(lent)} more until the context needs the room.`
    return `Of ${size(weightBytes)} of weights, ${more} The rest streams past in every pass.`
  }
  return `Of ${size(weightBytes)} of weights, ${size(weightBytes - streamedBytes)} stay in memory. The other ${size(streamedBytes)} stream past in every pass.`
}

function legendOf(plan) {
  const counts = countHomes(plan.units)
  const entry = (tone, words) => h('li', {}, h('i', { class: `key tone-${tone}` }), words)
  const items = []
  for (const [home, num] of Object.entries(counts)) {
    items.push(entry(home === 'disk' ? 'track' : home, `${num} ${num === 1 ? 'unit' : 'units'} ${homeWords(home)}`))
    const numLent = plan.units.filter((unit) => unit.home === home && unit.until_context_fills).length
    if (numLent) items.push(entry('ram lent', `${numLent} of them until the context needs the room`))
  }
  if (counts.disk) items.push(entry('disk', `read ahead, into ${size(plan.slotBytes)} of slots`))
  items.push(entry('compute', 'computing'))
  if (counts.disk && counts.ram && !plan.units.some((unit) => unit.until_context_fills)) {
    items.push(h('li', { class: 'small' }, 'Units that stay only until the context needs the room are drawn on the drive.'))
  }
  items.push(h('li', { class: 'small' }, 'The sweep is drawn at the measured rate of passes, slowed down for the eye; where exactly a pass is, nobody measures.'))
  return items
}

function mapWords(units) {
  if (!units.length) return 'No plan'
  const counts = Object.entries(countHomes(units)).map(([home, num]) => `${num} ${homeWords(home)}`)
  const inRam = units.filter((unit) => unit.home !== 'disk').map((unit) => (unit.block === null ? unit.stage : `${unit.stage} ${unit.block}`))
  const names = inRam.length > 24 ? `${inRam.slice(0, 24).join(', ')} and ${inRam.length - 24} more` : inRam.join(', ')
  return `Map of ${units.length} units in the order of a pass: ${counts.join(', ')}. Those that stay: ${names || 'none'}.`
}
