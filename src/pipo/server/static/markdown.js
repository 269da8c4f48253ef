// Text of a model → blocks → elements. Only elements made here can appear: nothing is parsed as HTML, nothing is fetched.
// A subset of CommonMark and GitHub's tables. Blocks know their source, so that a growing answer re-makes its last one alone.

import { h } from './dom.js'
import { inline } from './markdown_inline.js'

const AUTO = { dir: 'auto' } // Arabic and Hebrew run from the right
const MAX_DEPTH = 8 // of quotes and lists; deeper ones are text
const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/
const QUOTE = /^ {0,3}> ?(.*)$/
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/
const DELIMITER = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/

/** Blocks of a text: {type, source, …}. */
export function parse(text, depth = 0) {
  const lines = text.split('\n')
  const blocks = []
  let at = 0
  while (at < lines.length) {
    if (lines[at].trim() === '') {
      at += 1
      continue
    }
    const [block, end] = readBlock(lines, at, depth)
    block.source = lines.slice(at, end).join('\n')
    blocks.push(block)
    at = end
  }
  return blocks
}

function readBlock(lines, at, depth) {
  const line = lines[at]
  const fence = FENCE.exec(line)
  if (fence) return readFence(lines, at, fence)
  const heading = HEADING.exec(line)
  if (heading) return [{ type: 'heading', level: heading[1].length, text: heading[2] }, at + 1]
  if (RULE.test(line)) return [{ type: 'rule' }, at + 1]
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth)
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at, depth)
  if (isTable(lines, at)) return readTable(lines, at)
  return readParagraph(lines, at, depth)
}

function readFence(lines, at, [, indent, mark, language]) {
  const code = []
  let end = at + 1
  for (; end < lines.length; end += 1) {
    const line = lines[end]
    if (line.trim().startsWith(mark) && line.trim() === mark[0].repeat(line.trim().length)) return [{ type: 'code', language: language.trim(), code: code.join('\n') }, end + 1]
    code.push(line.slice(Math.min(indent.length, line.length - line.trimStart().length)))
  }
  return [{ type: 'code', language: language.trim(), code: code.join('\n') }, end]
}

function readQuote(lines, at, depth) {
  const inner = []
  let end = at
  for (; end < lines.length; end += 1) {
    const match = QUOTE.exec(lines[end])
    if (!match) break
    inner.push(match[1])
  }
  return [{ type: 'quote', blocks: parse(inner.join('\n'), depth + 1) }, end]
}

/** Lines indented deeper than the marker belong to its item, and blank ones in between. */
function readList(lines, at, depth) {
  const [, base, marker] = ITEM.exec(lines[at])
  const isOrdered = /\d/.test(marker)
  const items = []
  let end = at
  while (end < lines.length) {
    const match = ITEM.exec(lines[end])
    if (!match || match[1].length > base.length + 1 || /\d/.test(match[2]) !== isOrdered || RULE.test(lines[end])) break
    const inner = [match[4]]
    end += 1
    while (end < lines.length && belongs(lines, end, match[1].length)) {
      inner.push(lines[end].slice(Math.min(match[1].length + match[2].length + 1, indentOf(lines[end]))))
      end += 1
    }
    items.push(parse(inner.join('\n').trimEnd(), depth + 1))
    let next = end
    while (next < lines.length && lines[next].trim() === '') next += 1
    if (next < lines.length && ITEM.test(lines[next]) && indentOf(lines[next]) <= base.length + 1) end = next
  }
  return [{ type: 'list', start: isOrdered ? Number.parseInt(marker, 10) : null, items }, end]
}

const indentOf = (line) => line.length - line.trimStart().length

function belongs(lines, at, indent) {
  if (lines[at].trim() !== '') return indentOf(lines[at]) > indent + 1 || (indentOf(lines[at]) > indent && !ITEM.test(lines[at])) || isLazy(lines, at)
  let next = at
  while (next < lines.length && lines[next].trim() === '') next += 1
  return next < lines.length && indentOf(lines[next]) > indent + 1
}

/** A paragraph of an item that goes on without indent. */
function isLazy(lines, at) {
  return lines[at - 1].trim() !== '' && !startsBlock(lines, at)
}

function startsBlock(lines, at) {
  const line = lines[at]
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || isTable(lines, at)
}

const cellsOf = (line) =>
  line
    .trim()
    .replace(/^\|/, '')
    .replace(/(?<!\\)\|$/, '')
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll('\\|', '|'))

function isTable(lines, at) {
  const next = lines[at + 1]
  return next !== undefined && lines[at].includes('|') && next.includes('-') && DELIMITER.test(next) && cellsOf(lines[at]).length === cellsOf(next).length
}

function readTable(lines, at) {
  const align = cellsOf(lines[at + 1]).map((cell) => (cell.endsWith(':') ? (cell.startsWith(':') ? 'center' : 'end') : 'start'))
  const rows = []
  let end = at + 2
  for (; end < lines.length && lines[end].trim() !== '' && lines[end].includes('|'); end += 1) {
    rows.push(align.map((_, i) => cellsOf(lines[end])[i] ?? ''))
  }
  return [{ type: 'table', align, head: cellsOf(lines[at]), rows }, end]
}

function readParagraph(lines, at, depth) {
  let end = at + 1
  while (end < lines.length && lines[end].trim() !== '' && (depth >= MAX_DEPTH || !startsBlock(lines, end))) end += 1
  return [{ type: 'paragraph', text: lines.slice(at, end).map((line) => line.trim()).join('\n') }, end]
}

/** The element of a block. */
export function render(block) {
  switch (block.type) {
    case 'code':
      return renderCode(block)
    case 'heading':
      return h(`h${Math.min(block.level + 2, 6)}`, AUTO, ...inline(block.text))
    case 'rule':
      return h('hr')
    case 'quote':
      return h('blockquote', AUTO, ...block.blocks.map(render))
    case 'list':
      return h(block.start === null ? 'ul' : 'ol', { ...AUTO, start: block.start > 1 ? block.start : null }, ...block.items.map(renderItem))
    case 'table':
      return renderTable(block)
    default:
      return h('p', AUTO, ...inline(block.text))
  }
}

/** A first paragraph stays without <p>, so that simple lists are tight. */
function renderItem(blocks) {
  const [first, ...rest] = blocks
  if (first?.type !== 'paragraph') return h('li', {}, ...blocks.map(render))
  return h('li', {}, ...inline(first.text), ...rest.map(render))
}

function renderCode({ language, code }) {
  const words = h('code', {}, code)
  const copy = h('button', { type: 'button', class: 'copy', onclick: () => copyText(words, copy) }, 'Copy')
  // a long line is scrolled to with the keyboard
  return h('div', { class: 'code' }, h('div', { class: 'code-bar' }, h('span', {}, language || 'text'), copy), h('pre', { tabindex: '0', role: 'region', 'aria-label': `Code, ${language || 'text'}` }, words))
}

async function copyText(element, button) {
  try {
    await navigator.clipboard.writeText(element.textContent)
  } catch {
    // no clipboard without https: the old way takes what is selected
    getSelection().selectAllChildren(element)
    document.execCommand('copy')
  }
  button.textContent = 'Copied'
  setTimeout(() => (button.textContent = 'Copy'), 1500)
}

function renderTable({ align, head, rows }) {
  const row = (tag, cells) => h('tr', {}, ...cells.map((cell, i) => h(tag, { class: `align-${align[i]}` }, ...inline(cell))))
  return h('div', { class: 'table', tabindex: '0', role: 'region', 'aria-label': 'Table' }, h('table', AUTO, h('thead', {}, row('th', head)), h('tbody', {}, ...rows.map((cells) => row('td', cells)))))
}

/** Makes `container` show `text`; what did not change keeps its elements. Returns the blocks. */
export function update(container, text) {
  const blocks = parse(text)
  const shown = (container.shownSources ??= [])
  let same = 0
  // a block's type can change with its last line (a table's second), its source then does too
  while (same < shown.length && same < blocks.length && shown[same] === blocks[same].source) same += 1
  while (container.childNodes.length > same) container.lastChild.remove()
  for (const block of blocks.slice(same)) container.append(render(block))
  container.shownSources = blocks.map((block) => block.source)
  return blocks
}
