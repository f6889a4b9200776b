// In which order snapshotters are measured within each pair: random, so that nothing that drifts or lingers favours one
// of them, balanced, so that each is as often first as any other, and a function of the seed, so that a run can be repeated.
import { createHash } from 'node:crypto';

/** A number in [0, 1) that depends on nothing but the words. */
function chance(...words: readonly (string | number)[]): number {
  return createHash('sha256').update(JSON.stringify(words)).digest().readUInt32BE(0) / 2 ** 32;
}

function shuffled<T>(values: readonly T[], ...words: readonly (string | number)[]): T[] {
  return values
    .map((value, at) => ({ value, key: chance(...words, at) }))
    .sort((a, b) => a.key - b.key)
    .map(({ value }) => value);
}

/**
 * The order of `names` in pair number `pair` (from 0) of a cell. In each block of as many pairs as there are names,
 * every name has every place once.
 */
export function pairOrder<T>(names: readonly T[], seed: number, cell: string, pair: number): T[] {
  const size = names.length;
  const block = Math.floor(pair / size);
  const base = shuffled(names, seed, cell, block, 'names');
  const turns = shuffled(
    names.map((_name, at) => at),
    seed,
    cell,
    block,
    'turns',
  );
  const turn = turns[pair % size] ?? 0;
  return base.map((_name, at) => base[(at + turn) % size]!);
}
