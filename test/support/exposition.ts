// A small parser of Prometheus' text format, strict where a scraper is: for tests of what dedupd exports.
import assert from 'node:assert/strict';

export interface Family {
  readonly type: string;
  readonly help: string;
  /** By name and labels as written, e.g. `dedup_reads_total{result="hit"}`. */
  readonly samples: Map<string, number>;
}

const NAME = '[a-zA-Z_:][a-zA-Z0-9_:]*';
const LABEL = '[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\\\\n]|\\\\["\\\\n])*"';
const SAMPLE = new RegExp(`^(${NAME})(\\{${LABEL}(?:,${LABEL})*\\})? (\\S+)$`);

/** Which samples a family of that type may have besides those of its own name. */
const SUFFIXES: Readonly<Record<string, readonly string[]>> = {
  counter: [''],
  gauge: [''],
  histogram: ['_bucket', '_sum', '_count'],
};

function numberOf(text: string): number {
  if (text === '+Inf') return Number.POSITIVE_INFINITY;
  assert.match(text, /^-?\d+(\.\d+)?(e[+-]?\d+)?$/, text);
  return Number(text);
}

/** The families by name. Fails on any line that a scraper would refuse, and on a sample without a type before it. */
export function parseExposition(text: string): Map<string, Family> {
  assert.ok(text.endsWith('\n'), 'the last line ends');
  const families = new Map<string, Family>();
  let help: { name: string; text: string } | undefined;
  let current: { name: string; family: Family } | undefined;
  for (const line of text.split('\n')) {
    if (line === '') continue;
    const [, helped, says] = new RegExp(`^# HELP (${NAME}) (.+)$`).exec(line) ?? [];
    if (helped !== undefined) {
      help = { name: helped, text: says! };
      continue;
    }
    const [, typed, type] = new RegExp(`^# TYPE (${NAME}) (counter|gauge|histogram)$`).exec(line) ?? [];
    if (typed !== undefined) {
      assert.equal(help?.name, typed, line);
      assert.equal(families.has(typed), false, `${typed} comes twice`);
      current = { name: typed, family: { type: type!, help: help!.text, samples: new Map() } };
      families.set(typed, current.family);
      continue;
    }
    const [, name, labels = '', value] = SAMPLE.exec(line) ?? [];
    assert.ok(name !== undefined && current !== undefined, `not a sample: ${line}`);
    const { family } = current;
    assert.ok(SUFFIXES[family.type]!.map((suffix) => `${current!.name}${suffix}`).includes(name), line);
    assert.equal(family.samples.has(`${name}${labels}`), false, `${name}${labels} comes twice`);
    family.samples.set(`${name}${labels}`, numberOf(value!));
  }
  return families;
}
