// A short walk through everything that gives space back; STRESS_SECONDS and STRESS_SEED say how long and which one.
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { isRoot } from '../../../src/runtime.ts';
import { stressSpace } from '../../support/space-stress.ts';

const seconds = Number(process.env.STRESS_SECONDS ?? 20);
const seed = Number(process.env.STRESS_SEED ?? Math.floor(Math.random() * 2 ** 31));

it('no reader gets a wrong byte, or a zero in place of one, while space is given back in every way', {
  skip: !isRoot() && 'needs root: a FUSE session and loop devices',
  timeout: (seconds + 120) * 1000,
}, async (t) => {
  t.diagnostic(`seed ${seed}, ${seconds} s`);
  const result = await stressSpace({ seconds, seed });
  t.diagnostic(JSON.stringify(result));
  assert.deepEqual(result.wrong, []);
  assert.equal(result.damagedReads, 0);
  assert.ok(result.reads > 10 * seconds, `${result.reads} reads`);
  for (const what of ['added', 'removed', 'evicted', 'killed', 'quarantine ended'])
    assert.ok((result.done[what] ?? 0) > 0, `nothing was ${what}`);
});
