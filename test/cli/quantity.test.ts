// Rates and times as people write them.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { parseRate, parseTime } from '../../src/cli/quantity.ts';
import { errorCode } from '../../src/errors.ts';

const refused = (error: unknown): boolean => errorCode(error) === 'INVALID_ARGUMENT';

test('a rate is bytes per second in the units that people use', () => {
  assert.equal(parseRate('20MB/s'), 20_000_000);
  assert.equal(parseRate('512 KiB/s'), 524_288);
  assert.equal(parseRate('1.5g'), 1_500_000_000);
  assert.equal(parseRate('100b/s'), 100);
});

test('a rate without a unit, of nothing, or per hour is refused', () => {
  for (const text of ['', '20', '0MB/s', 'MB/s', '20MB/h', '-1MB', '20 parsecs'])
    assert.throws(() => parseRate(text), refused);
});

test('a time is a number of seconds, minutes, hours or days', () => {
  assert.equal(parseTime('90s'), 90_000);
  assert.equal(parseTime('30m'), 1_800_000);
  assert.equal(parseTime('24h'), 86_400_000);
  assert.equal(parseTime('7D'), 604_800_000);
});

test('a time without a unit, of nothing, or of centuries is refused', () => {
  for (const text of ['', '24', '0h', 'h', '1w', '-1h', '99999d']) assert.throws(() => parseTime(text), refused);
});
