// Elements without innerHTML: text is always text.

const SVG = 'http://www.w3.org/2000/svg'

/** An element with properties or attributes and children. Children may be strings, elements, null. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (name === 'class') element.className = value
    else element.setAttribute(name, value === true ? '' : value)
  }
  element.append(...children.filter((child) => child !== null && child !== undefined))
  return element
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...children)
  return element
}

export const byId = (id) => document.getElementById(id)

const hover = matchMedia('(hover: hover)') // a field that gets the focus opens the keyboard of a phone

/** Where what had the focus went away: the keyboard goes on from what is shown, not from the top of the page. */
export function focusContent() {
  const name = byId('chat').hidden ? 'pipeline' : hover.matches ? 'prompt' : 'log'
  byId(name).focus({ preventScroll: true })
}

/** Set text only where it differs: a screen reader and the layout are left alone otherwise. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text
}
