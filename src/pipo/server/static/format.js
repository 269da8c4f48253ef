// Numbers as people read them, units on the same line as their number. Sizes in powers of 1024, rates in powers of 1000, as the command line has them.

const NBSP = '\u00a0'
const SIZES = [['GiB', 2 ** 30], ['MiB', 2 ** 20], ['KiB', 2 ** 10]]

export function size(bytes) {
  for (const [unit, factor] of SIZES) if (Math.abs(bytes) >= factor) return `${(bytes / factor).toFixed(1)}${NBSP}${unit}`
  return `${Math.round(bytes)}${NBSP}B`
}

/** Bytes a second. */
export const rate = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)}${NBSP}GB/s` : `${(bytes / 1e6).toFixed(0)}${NBSP}MB/s`)

export const percent = (share) => `${Math.round(share * 100)}${NBSP}%`

export function count(number) {
  return Math.round(number).toLocaleString('en').replaceAll(',', '\u202f')
}

/** Three digits are enough for a rate. */
export function few(number) {
  if (number === 0) return '0'
  if (number < 10) return number.toFixed(number < 1 ? 2 : 1)
  return number < 100 ? number.toFixed(1) : count(number)
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`
  if (value < 100) return `${value.toFixed(0)} s`
  const minutes = Math.floor(value / 60)
  return minutes < 60 ? `${minutes} min ${Math.floor(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`
}

export const tokens = (number) => `${count(number)}${NBSP}${number === 1 ? 'token' : 'tokens'}`

/** A model's path or id without folder and ending. */
export const modelName = (name) => name.split(/[\\/]/).pop().replace(/\.gguf$/i, '') || name
