// The gate as a test: each figure of the committed baseline is one test, the table is printed.
import assert from 'node:assert/strict';
import { before, describe, test } from 'node:test';
import { compare, complaint, readBaseline, table } from './figures.ts';
import { type GateResult, remarks, runGate } from './gate.ts';

describe('what the product uses, against the baseline', () => {
  const baseline = readBaseline();
  let result: GateResult;

  before(
    async () => {
      result = await runGate(baseline);
    },
    { timeout: 500_000 },
  );

  for (const name of Object.keys(baseline.figures)) {
    test(`is no more: ${name}`, () => {
      const found = result.comparisons.find((comparison) => comparison.name === name);
      assert.ok(found !== undefined);
      assert.equal(complaint(found), undefined);
    });
  }

  test('is all in the baseline', (context) => {
    context.diagnostic(`\n${table(result.comparisons)}`);
    for (const remark of remarks(baseline, result.comparisons)) context.diagnostic(remark);
    const unknown = compare(baseline, result.measured).filter(({ verdict }) => verdict === 'new');
    assert.deepEqual(unknown.map(complaint), []);
  });
});
