// The gate: measures what the product uses and compares it with the committed baseline. Times are never compared.
//   node test/gate/gate.ts             prints a table; exit code 1 when a figure is worse
//   node test/gate/gate.ts --update    rewrites the baseline where figures have left their tolerance
import { existsSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { measureCounts } from './counts.ts';
import {
  BASELINE_FILE,
  type Baseline,
  type Comparison,
  compare,
  complaint,
  type Figures,
  least,
  machineKind,
  readBaseline,
  table,
  updated,
  writeBaseline,
} from './figures.ts';
import { Resources } from './resources.ts';

/** Rounds of resources: always so many, and up to so many while a figure is worse. */
const ROUNDS = { least: 5, most: 15 };
/** Rounds behind a new baseline. */
const UPDATE_ROUNDS = 10;

export interface GateResult {
  readonly measured: Figures;
  readonly comparisons: readonly Comparison[];
  readonly rounds: number;
}

/** Measures everything; again what is worse than the baseline, since a disturbance passes and a change stays. */
export async function runGate(baseline: Baseline, rounds = ROUNDS): Promise<GateResult> {
  const isWorse = (figures: Figures): boolean =>
    compare(baseline, figures).some(({ name, verdict }) => figures[name] !== undefined && verdict === 'worse');
  let counts = await measureCounts();
  if (isWorse(counts)) counts = least(counts, await measureCounts());
  await using resources = await Resources.create();
  do await resources.round();
  while (resources.rounds < rounds.least || (resources.rounds < rounds.most && isWorse(resources.figures())));
  const measured = { ...counts, ...resources.figures() };
  return { measured, comparisons: compare(baseline, measured), rounds: resources.rounds };
}

/** What a reader of the table must know beside it. */
export function remarks(baseline: Baseline, comparisons: readonly Comparison[]): string[] {
  const found: string[] = [];
  if (machineKind() !== baseline.machine) {
    found.push(`this machine is of another kind than the baseline's: ${machineKind()} instead of ${baseline.machine}`);
  }
  if (comparisons.some(({ verdict }) => verdict === 'better')) {
    found.push('some figures are better than the baseline: keep them with `make gate ARGS=--update`');
  }
  return found;
}

if (import.meta.main) {
  const { values } = parseArgs({ options: { update: { type: 'boolean', default: false } } });
  const baseline = existsSync(BASELINE_FILE) || !values.update ? readBaseline() : { machine: '', figures: {} };
  const rounds = values.update ? { least: UPDATE_ROUNDS, most: UPDATE_ROUNDS } : ROUNDS;
  const result = await runGate(baseline, rounds);
  console.log(table(result.comparisons));
  console.log(`least of ${result.rounds} rounds`);
  if (values.update) {
    writeBaseline(updated(baseline, result.measured));
    console.log(`written: ${BASELINE_FILE}`);
  } else {
    for (const remark of remarks(baseline, result.comparisons)) console.log(remark);
    const complaints = result.comparisons.map(complaint).filter((text) => text !== undefined);
    for (const text of complaints) console.error(text);
    if (complaints.length > 0) process.exitCode = 1;
  }
}
