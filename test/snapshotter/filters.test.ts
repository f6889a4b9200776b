// containerd's filter language, beyond what the semantic suite asks of every snapshotter.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { DedupError } from '../../src/errors.ts';
import { parseFilters } from '../../src/snapshotter/filters.ts';
import type { SnapshotRecord } from '../../src/snapshotter/snapshot-record.ts';

const SNAPSHOT = {
  id: 1,
  name: 'ns/1/a "quoted" \\ name',
  kind: 'committed',
  parent: 'ns/1/below',
  labels: { 'a.b/c': 'x/y', plain: 'é,1' },
} as unknown as SnapshotRecord;

function matches(...filters: string[]): boolean {
  return parseFilters(filters)(SNAPSHOT);
}

test('no filter and empty filters match everything', () => {
  assert.ok(matches());
  assert.ok(matches(''));
});

test('quoted values know the escapes of Go', () => {
  assert.ok(matches('name=="ns/1/a \\"quoted\\" \\\\ name"'));
  assert.ok(matches('name=="\\x6es/1/\\u0061 \\"quoted\\" \\134 name"'));
  assert.ok(!matches('name=="ns"'));
});

test('labels are named by quoted and dotted fields', () => {
  assert.ok(matches('labels."a.b/c"==x/y'));
  assert.ok(matches('labels.plain=="é,1"'));
  assert.ok(!matches('labels.plain==é'));
  assert.ok(!matches('labels.constructor'));
  assert.ok(!matches('labels.a.b'));
});

test('regular expressions may be quoted by slashes and bars', () => {
  assert.ok(matches('labels."a.b/c"~=/^x\\/y$/'));
  assert.ok(matches('name~=|^ns/\\d+/|'));
  assert.ok(!matches('name~=^below'));
});

test('any text is either a filter or INVALID_ARGUMENT', () => {
  const text = fc.oneof(fc.string(), fc.stringMatching(/^(?:name|labels|"|\.|==|~=|,|\/|\\|x| )*$/));
  fc.assert(
    fc.property(text, (filter) => {
      try {
        assert.equal(typeof matches(filter), 'boolean');
      } catch (error) {
        assert.ok(error instanceof DedupError && error.code === 'INVALID_ARGUMENT', String(error));
      }
    }),
    { numRuns: 2000 },
  );
});

test('any name can be asked for in quotes', () => {
  fc.assert(
    fc.property(fc.string(), (name) => {
      const quoted = `"${name.replace(/[\\"]/g, (char) => `\\${char}`)}"`;
      assert.ok(parseFilters([`name==${quoted}`])({ ...SNAPSHOT, name }));
    }),
  );
});
