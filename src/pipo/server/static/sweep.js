// The map of the weights, and the sweep over it. A drawing of what the pipeline does, not a measurement of where it is:
// /stats says how many passes there were, so the sweep goes at that rate, slowed down to what an eye can follow.

import { layOut } from './plan.js'

const MAX_SWEEPS_PER_S = 0.35
const FRAME_MS = 50 // 20 a second: on this machine a model computes with the same cores
const TRAIL = 3 // units

const still = matchMedia('(prefers-reduced-motion: reduce)')

export class Sweep {
  /** `gap` and `columnGap` in CSS pixels. */
  constructor(canvas, { gap = 2, maxCell = 40 } = {}) {
    this.canvas = canvas
    this.gap = gap
    this.maxCell = maxCell
    this.map = null
    this.phase = 0
    this.passesPerS = 0
    this.strength = 0 // 0 at rest, 1 in full motion
    this.ahead = 4
    this.lastAt = 0
    this.isLooping = false
    new ResizeObserver(() => this.resize()).observe(canvas)
    document.addEventListener('themechange', () => this.recolour())
    still.addEventListener('change', () => this.draw())
  }

  setPlan(plan) {
    const key = JSON.stringify(plan.units)
    if (key === this.key) return
    this.key = key
    this.map = layOut(plan.units)
    this.ahead = plan.slotUnits
    this.recolour()
  }

  setRate(passesPerS) {
    this.passesPerS = passesPerS
    if (passesPerS > 0 && !this.isLooping && !still.matches) {
      this.isLooping = true
      this.lastAt = performance.now()
      this.loop()
    }
  }

  loop() {
    setTimeout(() => {
      requestAnimationFrame((now) => {
        this.step(Math.min(0.25, Math.max(0, (now - this.lastAt) / 1000)))
        this.lastAt = now
        this.isLooping = (this.passesPerS > 0 || this.strength > 0) && !still.matches
        if (this.isLooping) this.loop()
      })
    }, FRAME_MS)
  }

  step(seconds) {
    const wanted = this.passesPerS > 0 ? 1 : 0
    this.strength += Math.max(-seconds * 2, Math.min(seconds * 2, wanted - this.strength))
    if (!this.map || this.canvas.offsetParent === null) return
    const num = this.map.cells.length || 1
    this.phase = (this.phase + seconds * num * Math.min(this.passesPerS, MAX_SWEEPS_PER_S)) % num
    this.draw()
  }

  resize() {
    const scale = Math.min(window.devicePixelRatio || 1, 2)
    const { clientWidth: width, clientHeight: height } = this.canvas
    if (!width || !height) return
    this.canvas.width = Math.round(width * scale)
    this.canvas.height = Math.round(height * scale)
    this.scale = scale
    if (!this.colours) this.recolour()
    this.draw()
  }

  /** A canvas knows no CSS variables; the element's own colour resolves them. */
  recolour() {
    const { style } = this.canvas
    const resolve = (name) => {
      style.color = `var(--${name})`
      return getComputedStyle(this.canvas).color
    }
    this.colours = { ram: resolve('ram'), disk: resolve('disk'), device: resolve('device'), track: resolve('track'), hot: resolve('compute') }
    style.color = ''
    this.draw()
  }

  draw() {
    if (!this.map || !this.colours || !this.canvas.width) return
    const context = this.canvas.getContext('2d')
    const { width, height } = this.canvas
    context.clearRect(0, 0, width, height)
    const numRows = Math.max(1, this.map.rows.length)
    const pitch = width / this.map.numColumns
    const gap = Math.min(this.gap * this.scale, pitch * 0.25)
    const rowHeight = (height - gap * (numRows - 1)) / numRows
    for (const cell of this.map.cells) {
      const x = Math.round(cell.column * pitch)
      const w = Math.max(1, Math.round((cell.column + 1) * pitch - gap) - x)
      const y = Math.round(cell.row * (rowHeight + gap))
      const tall = cell.isLoose ? height : Math.round(rowHeight)
      this.drawCell(context, cell, x, y, w, tall)
    }
    context.globalAlpha = 1
  }

  drawCell(context, cell, x, y, w, tall) {
    const num = this.map.cells.length
    const distance = (((cell.order - this.phase) % num) + num) % num // ahead of compute
    const past = num - distance // behind it
    const stays = cell.home !== 'disk'
    context.globalAlpha = 1
    context.fillStyle = stays ? this.colours[cell.home] ?? this.colours.ram : this.colours.track
    context.globalAlpha = cell.isLent ? 0.6 : 1
    context.fillRect(x, y, w, tall)
    context.globalAlpha = 1
    if (!stays) {
      // filled from below while it is read, drained after it has computed
      const level = past <= TRAIL ? 1 - past / TRAIL : distance <= this.ahead ? 1 - distance / (this.ahead + 1) : 0
      const filled = Math.round(tall * Math.min(1, level) * this.strength)
      context.fillStyle = this.colours.disk
      if (past <= TRAIL) context.globalAlpha = 0.55
      context.fillRect(x, y + tall - filled, w, filled)
    }
    if (past <= 1) {
      context.globalAlpha = 0.75 * this.strength
      context.fillStyle = this.colours.hot
      context.fillRect(x, y, w, tall)
    }
  }
}
