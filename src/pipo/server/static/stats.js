// Polls /stats while somebody can see it, and turns counters into rates.

import { getStats } from './api.js'

const POLL_MS = 1000
const RETRY_MS = 4000
export const HISTORY_S = 120
const NOW_S = 4 // headline figures are means over so long

const NAMES = ['bytes_read', 'compute_s', 'wall_s', 'prompt_tokens', 'cached_tokens', 'completion_tokens', 'num_passes']

/** Intervals between polls, newest last: {end, seconds, rates} with rates a second of every counter, null while unknown. */
export class History {
  constructor() {
    this.clear()
  }

  clear() {
    this.last = null
    this.intervals = []
  }

  add(stats) {
    const { last } = this
    if (last && stats.uptime_s < last.uptime_s) this.clear() // another server process
    if (this.last) this.addInterval(this.last, stats)
    if (!this.last || stats.now > this.last.now) this.last = stats
    const oldest = stats.now - HISTORY_S
    while (this.intervals.length && this.intervals[0].end < oldest) this.intervals.shift()
  }

  addInterval(last, stats) {
    const seconds = stats.now - last.now
    if (seconds <= 0) return
    const interval = { end: stats.now, seconds, rates: null }
    this.intervals.push(interval)
    const isInPass = stats.engine.num_running > 0 && stats.engine.num_passes === last.engine.num_passes
    if (!isInPass) this.spread(last, stats)
  }

  /** Counters move when a pass ends. One of 30 s is 30 s of work, not one second's: it is shared out over all of them. */
  spread(last, stats) {
    const open = []
    for (let i = this.intervals.length - 1; i >= 0 && this.intervals[i].rates === null; i -= 1) open.push(this.intervals[i])
    const seconds = open.reduce((sum, interval) => sum + interval.seconds, 0)
    const rates = difference(last.engine, stats.engine, seconds)
    for (const interval of open) interval.rates = rates
  }

  get isActive() {
    const { engine } = this.last
    return engine.num_running > 0 || engine.num_waiting > 0 || (this.intervals.at(-1)?.rates?.num_passes ?? 0) > 0
  }

  /** Passes a second while there is work, at least a crawl; 0 at rest. */
  get sweepsPerS() {
    return this.isActive ? Math.max(this.now.num_passes, 0.02) : 0
  }

  /** Rates of now: a mean over the newest known seconds. Zeros before anything is known. */
  get now() {
    const known = this.intervals.filter((interval) => interval.rates !== null)
    const parts = []
    let seconds = 0
    for (let i = known.length - 1; i >= 0 && seconds < NOW_S; i -= 1) {
      parts.push(known[i])
      seconds += known[i].seconds
    }
    return mean(parts, seconds)
  }
}

function difference(before, after, seconds) {
  const rates = { stalls: {} }
  for (const name of NAMES) rates[name] = Math.max(0, ((after[name] ?? 0) - (before[name] ?? 0)) / seconds)
  for (const [cause, value] of Object.entries(after.stall_s ?? {})) {
    rates.stalls[cause] = Math.max(0, (value - (before.stall_s?.[cause] ?? 0)) / seconds)
  }
  return rates
}

function mean(parts, seconds) {
  const rates = { stalls: {} }
  for (const name of NAMES) rates[name] = 0
  for (const part of parts) {
    const weight = part.seconds / seconds
    for (const name of NAMES) rates[name] += part.rates[name] * weight
    for (const [cause, value] of Object.entries(part.rates.stalls)) rates.stalls[cause] = (rates.stalls[cause] ?? 0) + value * weight
  }
  return rates
}

/** Calls onStats(stats) about once a second while the page is visible, onError(error) when none came. */
export class Poller {
  constructor(onStats, onError) {
    this.onStats = onStats
    this.onError = onError
    this.timer = null
    this.controller = null
    document.addEventListener('visibilitychange', () => (document.hidden ? this.stop() : this.start()))
    if (!document.hidden) this.start()
  }

  start() {
    this.stop()
    this.poll()
  }

  stop() {
    clearTimeout(this.timer)
    this.controller?.abort()
  }

  async poll() {
    const controller = new AbortController()
    this.controller = controller
    let wait = POLL_MS
    try {
      this.onStats(await getStats(controller.signal))
    } catch (error) {
      if (controller.signal.aborted) return
      if (error.status !== 503) wait = RETRY_MS // it will be ready soon
      this.onError(error)
    }
    if (!controller.signal.aborted) this.timer = setTimeout(() => this.poll(), wait)
  }
}
