// Small figures in SVG, each with its words.

import { h, setText, svg } from './dom.js'
import { HISTORY_S } from './stats.js'

const WIDTH = 240
const HEIGHT = 48

/** Two minutes of one rate. `words(rate)` prints a value; `top` is a fixed ceiling, or null for the highest seen. */
export class Sparkline {
  constructor(title, tone, words, { top = null, note = '' } = {}) {
    this.title = title
    this.words = words
    this.top = top
    this.note = note
    this.area = svg('path', { class: 'area' })
    this.line = svg('path', { class: 'line', 'vector-effect': 'non-scaling-stroke' })
    this.figure = svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img' }, svg('line', { class: 'floor', x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5, 'vector-effect': 'non-scaling-stroke' }), this.area, this.line)
    this.value = h('strong')
    this.caption = h('small')
    this.element = h('figure', { class: `spark tone-${tone}` }, h('figcaption', {}, h('span', {}, title), this.value), this.figure, this.caption)
  }

  /** `valueOf(rates)` picks the value of an interval; `now` is the headline. */
  show(intervals, end, valueOf, now) {
    const points = intervals.map((interval) => ({ ...interval, value: interval.rates === null ? null : valueOf(interval.rates) }))
    const known = points.filter((point) => point.value !== null)
    const highest = Math.max(0, ...known.map((point) => point.value))
    const top = this.top ?? highest
    const paths = trace(points, end, top || 1)
    this.line.setAttribute('d', paths.line)
    this.area.setAttribute('d', paths.area)
    setText(this.value, this.words(now))
    const caption = `highest ${this.words(highest)}${this.note}`
    setText(this.caption, caption)
    const time = known.reduce((sum, point) => sum + point.seconds, 0)
    const average = time ? known.reduce((sum, point) => sum + point.value * point.seconds, 0) / time : 0
    this.figure.setAttribute('aria-label', `${this.title}, last two minutes: now ${this.words(now)}, mean ${this.words(average)}, ${caption}`)
  }
}

/** Steps, for a value is a mean over its interval; unknown ones leave a hole. */
function trace(points, end, top) {
  let line = ''
  let area = ''
  let run = []
  const flush = () => {
    if (!run.length) return
    line += `M${run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join('L')}`
    area += `M${run[0][0].toFixed(1)} ${HEIGHT}L${run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join('L')}L${run.at(-1)[0].toFixed(1)} ${HEIGHT}Z`
    run = []
  }
  for (const { end: at, seconds, value } of points) {
    if (value === null) {
      flush()
      continue
    }
    const xOf = (time) => WIDTH - ((end - time) / HISTORY_S) * WIDTH
    const y = HEIGHT - 1 - Math.min(1, value / top) * (HEIGHT - 3)
    run.push([Math.max(0, xOf(at - seconds)), y], [Math.max(0, xOf(at)), y])
  }
  flush()
  return { line, area }
}

/** Parts of a whole as one bar, with a table that says the same in words. Marks are ticks on the bar: {name, words, share}. */
export class StackedBar {
  constructor(title) {
    this.title = title
    this.bar = h('div', { class: 'stack', role: 'img' })
    this.rows = h('tbody')
    this.element = h('div', { class: 'stacked' }, this.bar, h('table', { class: 'parts' }, h('caption', { class: 'hidden' }, title), this.rows))
    this.segments = new Map()
  }

  /** Parts: {name, tone, share, words}. A share is of the whole bar. */
  show(parts, marks = []) {
    const names = parts.map((part) => part.name).join('\n') + marks.map((mark) => mark.name).join('\n')
    if (names !== this.names) this.build(parts, marks)
    this.names = names
    for (const part of parts) {
      const { segment, value } = this.segments.get(part.name)
      segment.style.width = `${Math.min(100, part.share * 100)}%`
      setText(value, part.words)
    }
    marks.forEach((mark, i) => (this.marks[i].style.insetInlineStart = `${Math.min(100, mark.share * 100)}%`))
    this.bar.setAttribute('aria-label', `${this.title}: ${[...parts.map((part) => `${part.name} ${part.words}`), ...marks.map((mark) => `${mark.name} ${mark.words}`)].join(', ')}`)
  }

  build(parts, marks) {
    this.segments.clear()
    this.rows.replaceChildren()
    this.bar.replaceChildren()
    for (const { name, tone } of parts) {
      const segment = h('span', { class: `segment tone-${tone}`, title: name })
      const value = h('td')
      this.segments.set(name, { segment, value })
      this.bar.append(segment)
      this.rows.append(h('tr', {}, h('th', { scope: 'row' }, h('i', { class: `key tone-${tone}`, 'aria-hidden': 'true' }), name), value))
    }
    this.marks = marks.map((mark) => h('span', { class: 'tick', title: mark.name }))
    this.bar.append(...this.marks)
  }
}
