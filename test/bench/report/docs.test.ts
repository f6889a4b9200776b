// docs/benchmarks.md and its charts are those of the committed result. The page itself is compared in config.test.ts with
// all other generated pages.
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { describe, test } from 'node:test';
import { BENCHMARKS, benchmarkCharts, benchmarkPage, staleCharts } from '../../../scripts/benchmark-docs.ts';

const page = readFileSync(join(dirname(BENCHMARKS), 'benchmarks.md'), 'utf8');

describe('charts of the documentation', () => {
  test('are what "make docs" would draw, and no others lie there', () => {
    for (const [file, text] of benchmarkCharts()) assert.equal(readFileSync(file, 'utf8'), text, basename(file));
    assert.deepEqual(staleCharts(), []);
  });

  test('every picture that the page shows is there', () => {
    assert.ok(page.endsWith(benchmarkPage()));
    for (const [, path] of page.matchAll(/!\[[^\]]*\]\(([^)]+)\)/g)) {
      assert.ok(existsSync(join(dirname(BENCHMARKS), path!)), path);
    }
  });
});
