// Server-sent events from a fetch. EventSource cannot POST. Source: WHATWG HTML, "Interpreting an event stream".

/** Yields the data of each event. Lines end with LF or CRLF; comments and other fields are passed over. */
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  let data = []
  try {
    for (;;) {
      const { value, done } = await reader.read()
      if (done) return // an event without its blank line is not whole
      rest += value
      const lines = rest.split('\n')
      rest = lines.pop()
      for (const raw of lines) {
        const line = raw.endsWith('\r') ? raw.slice(0, -1) : raw
        if (line === '' && data.length > 0) {
          yield data.join('\n')
          data = []
        } else if (line.startsWith('data:')) {
          data.push(line.slice(line[5] === ' ' ? 6 : 5))
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}) // who stops reading wants no more; an aborted stream is already gone
  }
}
