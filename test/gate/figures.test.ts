import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import {
  type Baseline,
  type BaselineFigure,
  compare,
  complaint,
  type Figure,
  least,
  readBaseline,
  table,
  updated,
  writeBaseline,
} from './figures.ts';

const HERE = 'this machine';

function baselineOf(figures: Record<string, BaselineFigure>): Baseline {
  return { machine: HERE, figures };
}

function verdictOf(known: BaselineFigure, value: number | string, machine = HERE): string {
  const measured: Record<string, Figure> = { one: { value, unit: known.unit } };
  return compare(baselineOf({ one: known }), measured, machine)[0]!.verdict;
}

describe('a figure of the gate', () => {
  const exact: BaselineFigure = { value: 10, unit: 'requests', tolerance: 'exact' };
  const about: BaselineFigure = { value: 100, unit: 'bytes', tolerance: '+10 %', elsewhere: '+50 %' };
  const digest: BaselineFigure = { value: 'sha256:aa', unit: 'digest', tolerance: 'same' };

  it('is worse by one when it is exact, and better by one less', () => {
    assert.equal(verdictOf(exact, 11), 'worse');
    assert.equal(verdictOf(exact, 10), 'same');
    assert.equal(verdictOf(exact, 9), 'better');
    assert.equal(verdictOf({ ...exact, value: 0 }, 1), 'worse');
  });

  it('may move within its tolerance', () => {
    assert.equal(verdictOf(about, 110), 'same');
    assert.equal(verdictOf(about, 90), 'same');
    assert.equal(verdictOf(about, 111), 'worse');
    assert.equal(verdictOf(about, 89), 'better');
  });

  it('may move further on another kind of machine', () => {
    assert.equal(verdictOf(about, 140, 'another machine'), 'same');
    assert.equal(verdictOf(about, 151, 'another machine'), 'worse');
    assert.equal(verdictOf(exact, 11, 'another machine'), 'worse');
  });

  it('that must be the same fails with any change', () => {
    assert.equal(verdictOf(digest, 'sha256:aa'), 'same');
    assert.equal(verdictOf(digest, 'sha256:bb'), 'worse');
  });

  it('fails when it is in the baseline only, and when it is not in the baseline', () => {
    const [fresh, gone] = compare(baselineOf({ gone: exact }), { fresh: { value: 1, unit: 'reads' } }, HERE);
    assert.equal(fresh?.verdict, 'new');
    assert.equal(gone?.verdict, 'missing');
    assert.match(complaint(fresh!) ?? '', /^fresh: measured 1 reads, the baseline has no such figure; .*--update/);
    assert.match(complaint(gone!) ?? '', /^gone: in the baseline, but not measured any more; .*--update/);
  });

  it('that is worse is named with both values, the tolerance and what to do', () => {
    const [worse] = compare(baselineOf({ one: about }), { one: { value: 1234, unit: 'bytes' } }, HERE);
    assert.match(
      complaint(worse!) ?? '',
      /^one: measured 1,234 bytes, the baseline is 100 bytes \(\+10 %\); .*--update/,
    );
    assert.match(table([worse!]), /one +100 bytes +1,234 bytes +\+1134\.0 % +\+10 % +worse/);
  });

  it('that is better passes', () => {
    const [better] = compare(baselineOf({ one: exact }), { one: { value: 3, unit: 'requests' } }, HERE);
    assert.equal(complaint(better!), undefined);
  });

  it('keeps the least of several measurements', () => {
    const a = { x: { value: 3, unit: 'reads' }, y: { value: 5, unit: 'reads' } } as const;
    const b = { x: { value: 4, unit: 'reads' }, y: { value: 2, unit: 'reads' } } as const;
    assert.deepEqual(least(a, b), { x: { value: 3, unit: 'reads' }, y: { value: 2, unit: 'reads' } });
  });
});

describe('an update of the baseline', () => {
  const known: Record<string, BaselineFigure> = {
    worse: { value: 10, unit: 'requests', tolerance: 'exact' },
    within: { value: 100, unit: 'bytes', tolerance: '+10 %', elsewhere: '+50 %' },
    better: { value: 100, unit: 'bytes', tolerance: '+10 %' },
    gone: { value: 1, unit: 'reads', tolerance: 'exact' },
  };
  const measured: Record<string, Figure> = {
    worse: { value: 12, unit: 'requests' },
    within: { value: 108, unit: 'bytes' },
    better: { value: 50, unit: 'bytes' },
    fresh: { value: 7, unit: 'reads' },
  };

  it('takes over what left its tolerance, keeps the rest and all tolerances', () => {
    assert.deepEqual(updated(baselineOf(known), measured, HERE), {
      machine: HERE,
      figures: {
        worse: { value: 12, unit: 'requests', tolerance: 'exact' },
        within: { value: 100, unit: 'bytes', tolerance: '+10 %', elsewhere: '+50 %' },
        better: { value: 50, unit: 'bytes', tolerance: '+10 %' },
        fresh: { value: 7, unit: 'reads', tolerance: 'exact' },
      },
    });
  });

  it('takes over everything on another kind of machine', () => {
    const { machine, figures } = updated(baselineOf(known), measured, 'another machine');
    assert.equal(machine, 'another machine');
    assert.equal(figures.within?.value, 108);
  });

  it('is written and read again; a tolerance that says nothing is refused', () => {
    const dir = mkdtempSync(join(tmpdir(), 'gate-test-'));
    try {
      const file = join(dir, 'baseline.json');
      writeBaseline(baselineOf(known), file);
      assert.deepEqual(readBaseline(file), baselineOf(known));
      for (const tolerance of ['10 %', '-10 %', 'about']) {
        writeFileSync(file, JSON.stringify(baselineOf({ one: { value: 1, unit: 'reads', tolerance } })));
        assert.throws(() => readBaseline(file), /one: tolerance ".*" does not suit 1/);
      }
    } finally {
      rmSync(dir, { recursive: true, force: true });
    }
  });
});
