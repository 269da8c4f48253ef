// What `pipo plan --json` says, in the words the page needs. Every part may be missing.

/** {units, weightBytes, residentBytes, streamedBytes, driveBytesPerS, slotUnits, device, prediction, changes, machine} of an EngineInfo. */
export function readPlan(info) {
  const whole = info?.plan ?? {}
  const plan = whole.plan ?? {}
  const units = Array.isArray(plan.units) ? plan.units : []
  return {
    units,
    weightBytes: plan.weight_bytes ?? 0,
    residentBytes: plan.breakdown_bytes?.['resident weights'] ?? 0,
    streamedBytes: plan.streamed_bytes_per_pass ?? 0,
    driveBytesPerS: plan.drive_bytes_per_s ?? whole.drive_bytes_per_s ?? 0,
    slotUnits: slotUnits(plan, units),
    slotBytes: plan.breakdown_bytes?.slots ?? 0,
    device: plan.device ?? null,
    prediction: whole.prediction ?? null,
    workload: whole.workload ?? null,
    changes: whole.what_would_help ?? [],
    machine: whole.machine ?? null,
  }
}

/** How many units of middling size the slots hold: as far ahead reading can be. */
function slotUnits(plan, units) {
  const slots = plan.breakdown_bytes?.slots
  if (!slots || !units.length || !plan.weight_bytes) return 4
  return Math.max(1, Math.min(12, slots / (plan.weight_bytes / units.length)))
}

/** Units as a map: rows are stages, columns blocks. Units without a block (the head) have columns of their own. */
export function layOut(units) {
  const rows = []
  const columns = new Map()
  const cells = units.map((unit, order) => {
    const isLoose = unit.block === null || unit.block === undefined
    const column = isLoose ? `${unit.stage}` : `${unit.block}`
    if (!columns.has(column)) columns.set(column, columns.size)
    if (!isLoose && !rows.includes(unit.stage)) rows.push(unit.stage)
    return { order, stage: unit.stage, block: unit.block, home: unit.home, isLent: Boolean(unit.until_context_fills), column: columns.get(column), isLoose }
  })
  for (const cell of cells) cell.row = cell.isLoose ? 0 : rows.indexOf(cell.stage)
  return { cells, rows, numColumns: columns.size }
}

const HOMES = { ram: 'in memory', disk: 'on the drive', device: 'on the device' }
export const homeWords = (home) => HOMES[home] ?? home

export function countHomes(units) {
  const counts = {}
  for (const { home } of units) counts[home] = (counts[home] ?? 0) + 1
  return counts
}
