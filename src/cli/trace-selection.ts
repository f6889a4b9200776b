// Which trace of the directory a word on the command line names. Used by the `trace` verbs.
import { DedupError } from '../errors.ts';
import { type ImageReference, parseReference } from '../fs/registry/reference.ts';
import { shownName } from '../prefetch/shown-name.ts';
import { type TraceInfo, TraceStore } from '../prefetch/trace-store.ts';
import { isRoot } from '../runtime.ts';
import type { CliContext } from './context.ts';

/** Digits of an ID in tables and messages. */
const ID_DIGITS = 12;
/** Fewer digits of an ID are no name of a trace. */
const LEAST_DIGITS = 4;
const LISTED = 5;

export interface Traces {
  readonly store: TraceStore;
  /** Latest first, one for each image. */
  readonly list: readonly TraceInfo[];
}

/** The directory of the configuration and what is in it. Errors: STORE_IO with what to do. */
export async function openTraces(context: CliContext): Promise<Traces> {
  const store = new TraceStore(context.config().prefetch.trace_dir);
  try {
    const list = await store.list();
    return { store, list: list.filter(({ id }, at) => list.findIndex((other) => other.id === id) === at) };
  } catch (cause) {
    if (isRoot() || !(cause instanceof DedupError)) throw cause;
    throw new DedupError(cause.code, cause.message, { cause, hint: 'run it with sudo' });
  }
}

export function shortId(id: string): string {
  return id.slice(0, ID_DIGITS);
}

/** "registry.example/app:1", as people may see it. */
export function imageName(of: {
  readonly repository: string;
  readonly tag: string;
  readonly manifest: string;
}): string {
  const { repository, tag, manifest } = of;
  if (repository === '') return 'an image without a name';
  return shownName(tag !== '' ? `${repository}:${tag}` : manifest !== '' ? `${repository}@${manifest}` : repository);
}

/**
 * The trace that `word` names: digits of its ID, a reference, or "@" and the digest of a manifest. Errors: NOT_FOUND,
 * INVALID_ARGUMENT when it names several, INVALID_REFERENCE.
 */
export function selectTrace(list: readonly TraceInfo[], word: string): TraceInfo {
  const isHex = /^[0-9a-f]+$/.test(word);
  const byId = isHex && word.length >= LEAST_DIGITS ? list.filter(({ id }) => id.startsWith(word)) : [];
  // Digits can be the name of an image, too; 64 of them cannot.
  const found = byId.length > 0 || (isHex && word.length >= 64) ? byId : list.filter(referenceFilter(word));
  const [first, ...others] = found;
  if (first === undefined) {
    const short = isHex && word.length < LEAST_DIGITS ? `, an ID by ${LEAST_DIGITS} of its digits at least` : '';
    throw new DedupError('NOT_FOUND', `there is no trace of ${JSON.stringify(word)}`, {
      hint: `"dedup-snapshotter trace ls" lists them; name one by its ID or its image${short}`,
    });
  }
  if (others.length === 0) return first;
  const some = found.slice(0, LISTED).map((info) => `${shortId(info.id)} (${imageName(info)})`);
  throw new DedupError('INVALID_ARGUMENT', `${JSON.stringify(word)} names ${found.length} traces`, {
    hint: `choose one by its ID: ${some.join(', ')}${found.length > LISTED ? ', …' : ''}`,
  });
}

function referenceFilter(word: string): (info: TraceInfo) => boolean {
  const digest = /^@?(sha256:[0-9a-f]{64})$/.exec(word)?.[1];
  if (digest !== undefined) return ({ manifest }) => manifest === digest;
  const wanted = parseReference(word);
  return (info) => {
    if (fullName(info.repository) !== `${wanted.host}/${wanted.path}`) return false;
    return wanted.digest === undefined ? info.tag === wanted.tag : info.manifest === wanted.digest;
  };
}

/** Host and path in full: a trace that somebody wrote by hand may say "nginx". */
function fullName(repository: string): string {
  try {
    const { host, path } = parseReference(repository);
    return `${host}/${path}`;
  } catch {
    return repository; // It has no name that a reference could match.
  }
}

/** Where the image of a trace is in a registry. Errors: INVALID_ARGUMENT when the trace does not say, INVALID_REFERENCE. */
export function imageOf(trace: Pick<TraceInfo, 'repository' | 'tag' | 'manifest'>): ImageReference {
  const { repository, tag, manifest } = trace;
  if (repository === '' || (tag === '' && manifest === '')) {
    throw new DedupError('INVALID_ARGUMENT', 'the trace does not say which image it is of', {
      hint: 'name the image with --to',
    });
  }
  return parseReference(manifest === '' ? `${repository}:${tag}` : `${repository}@${manifest}`);
}
