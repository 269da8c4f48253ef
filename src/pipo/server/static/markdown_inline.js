// Emphasis, code, links and line breaks inside a block.

import { h } from './dom.js'

const isSafe = (url) => /^(?:https?:\/\/|mailto:)[^\s]+$/i.test(url) && URL.canParse(url)
const BARE_URL = /https?:\/\/[^\s<>"'`\\^{|}]+/y
const LINK = /(!?)\[((?:[^\[\]\\]|\\.){0,2000})\]\(\s*<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/y
const PAIRS = [['***', ['em', 'strong']], ['**', ['strong']], ['__', ['strong']], ['~~', ['s']], ['*', ['em']], ['_', ['em']]]
const PLAIN = /[^\\`*_~[!h\n]+/y // what cannot begin anything
const MAX_DEPTH = 6

const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character)

/** Nodes and strings of one block's text. */
export function inline(text, depth = 0) {
  const parts = []
  const missing = new Set() // marks that do not come again: looked for once, or a wall of asterisks takes a minute
  let plain = ''
  const flush = () => {
    if (plain) parts.push(plain)
    plain = ''
  }
  let at = 0
  while (at < text.length) {
    const found = depth < MAX_DEPTH ? readSpecial(text, at, depth, missing) : null
    if (found) {
      flush()
      parts.push(...found.nodes)
      at = found.end
      continue
    }
    PLAIN.lastIndex = at
    const run = PLAIN.exec(text)
    plain += run ? run[0] : text[at]
    at += run ? run[0].length : 1
  }
  flush()
  return parts
}

function readSpecial(text, at, depth, missing) {
  switch (text[at]) {
    case '\\':
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? '') ? { nodes: [text[at + 1]], end: at + 2 } : null
    case '\n':
      return { nodes: [h('br')], end: at + 1 }
    case '`':
      return readCode(text, at, missing)
    case '[':
    case '!':
      return readLink(text, at, depth)
    case 'h':
      return isWord(text[at - 1]) ? null : readUrl(text, at)
    case '*':
    case '_':
    case '~':
      return readPair(text, at, depth, missing)
    default:
      return null
  }
}

function readCode(text, at, missing) {
  const mark = /`+/y
  mark.lastIndex = at
  const ticks = mark.exec(text)[0]
  if (missing.has(ticks)) return { nodes: [ticks], end: at + ticks.length }
  let close = text.indexOf(ticks, at + ticks.length)
  while (close !== -1 && (text[close + ticks.length] === '`' || text[close - 1] === '`')) {
    while (text[close] === '`') close += 1
    close = text.indexOf(ticks, close)
  }
  if (close === -1) {
    missing.add(ticks)
    return { nodes: [ticks], end: at + ticks.length }
  }
  const code = text.slice(at + ticks.length, close).replaceAll('\n', ' ')
  const isPadded = code.length > 2 && code.startsWith(' ') && code.endsWith(' ')
  return { nodes: [h('code', {}, isPadded ? code.slice(1, -1) : code)], end: close + ticks.length }
}

/** Links go to the web or to mail; anything else stays text. An image is a link to it: the page fetches nothing. */
function readLink(text, at, depth) {
  LINK.lastIndex = at
  const match = LINK.exec(text)
  if (!match || !isSafe(match[3])) return null
  const label = match[2] || match[3]
  return { nodes: [anchor(match[3], ...(match[1] ? [`image: ${label}`] : inline(label, depth + 1)))], end: at + match[0].length }
}

function readUrl(text, at) {
  BARE_URL.lastIndex = at
  const match = BARE_URL.exec(text)
  if (!match) return null
  let url = match[0].replace(/[.,:;!?*_~]+$/, '')
  if (url.endsWith(')') && !url.includes('(')) url = url.slice(0, -1)
  return isSafe(url) ? { nodes: [anchor(url, url)], end: at + url.length } : null
}

const anchor = (url, ...children) => h('a', { href: url, target: '_blank', rel: 'noopener noreferrer nofollow' }, ...children)

function readPair(text, at, depth, missing) {
  for (const [mark, tags] of PAIRS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue
    const start = at + mark.length
    if (/\s/.test(text[start] ?? ' ') || (mark[0] === '_' && isWord(text[at - 1]))) continue
    const close = closing(text, start, mark)
    if (close === -1) {
      missing.add(mark)
      continue
    }
    const inner = inline(text.slice(start, close), depth + 1)
    const node = tags.reduce((children, tag) => [h(tag, {}, ...children)], inner)
    return { nodes: node, end: close + mark.length }
  }
  const run = /[*_~]+/y // nothing pairs here: the run is text
  run.lastIndex = at
  const marks = run.exec(text)[0]
  return { nodes: [marks], end: at + marks.length }
}

/** Where the mark that closes stands: not after a space, not part of a longer run, for _ not inside a word. -1: nowhere. */
function closing(text, start, mark) {
  let at = start
  for (;;) {
    at = text.indexOf(mark, at)
    if (at === -1) return -1
    let end = at
    while (text[end] === mark[0]) end += 1
    const run = end - at
    const isLeft = at > start && !/\s/.test(text[at - 1]) && text[at - 1] !== '\\'
    const fits = run === mark.length || (run === 3 && mark.length === 1 && text[at - 1] !== mark[0]) || (run === 3 && mark.length === 2)
    if (isLeft && fits && !(mark[0] === '_' && isWord(text[end]))) return run > mark.length ? end - mark.length : at
    at = end
  }
}
