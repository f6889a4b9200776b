// The directory of access traces (configuration key `prefetch.trace_dir`): one file an image, named after it. Used by dedupd
// and, for files alone, by the `trace` verbs; whoever else puts a file there is believed as little as a registry is.
import { constants } from 'node:fs';
import { type FileHandle, mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import { type AccessTrace, formatTrace, MAX_TRACE_BYTES, parseTrace, traceId } from './access-trace.ts';

const SUFFIX = '.trace';
/** Oldest traces go beyond this number. */
const MAX_TRACES = 1000;
/** What save() writes before it has its name, and how long that takes at most, milliseconds. */
const HALF_WRITTEN = /\.trace\.tmp-\d+-\d+$/;
const HALF_WRITTEN_MS = 600_000;
/** Bytes of a file that hold its header, however many layers an image has. */
const HEAD_BYTES = 32 * 1024;

/** What the head of a trace file says. */
export interface TraceInfo {
  readonly id: string;
  readonly file: string;
  readonly bytes: number;
  readonly repository: string;
  readonly tag: string;
  readonly manifest: string;
  readonly runs: number;
  readonly updatedMs: number;
}

export class TraceStore {
  readonly directory: string;
  #saved = 0;

  constructor(directory: string) {
    this.directory = directory;
  }

  /** Where the trace of an image is kept: its name for people, the beginning of its id for programs. */
  #fileName(trace: AccessTrace): string {
    const name = [trace.repository, trace.tag].filter((part) => part !== '').join('_');
    const safe = name.replace(/[^A-Za-z0-9._-]/g, '_').slice(0, 120);
    return `${safe === '' ? 'image' : safe}-${traceId(trace.layers).slice(0, 16)}${SUFFIX}`;
  }

  async #files(): Promise<string[]> {
    const names = await readdir(this.directory).catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return [];
      throw wrapError(error, `reading ${this.directory}`, 'STORE_IO');
    });
    return names.filter((name) => name.endsWith(SUFFIX));
  }

  /** The trace of the image with this id; undefined when there is none, or none that can be read. */
  async load(id: string): Promise<AccessTrace | undefined> {
    for (const name of await this.#files()) {
      if (!name.endsWith(`-${id.slice(0, 16)}${SUFFIX}`)) continue;
      const trace = await this.read(join(this.directory, name)).catch((error: unknown) => {
        // Damaged, or gone since: a hint less. The next run writes it anew.
        if (['TRACE_INVALID', 'STORE_IO'].includes(errorCode(error))) return undefined;
        throw error;
      });
      if (trace !== undefined && traceId(trace.layers) === id) return trace;
    }
    return undefined;
  }

  /** A trace from a file. Errors: STORE_IO, TRACE_INVALID. */
  async read(path: string): Promise<AccessTrace> {
    let text: string;
    try {
      await using file = await openFile(path);
      const { size } = await file.stat();
      if (size > MAX_TRACE_BYTES)
        throw new DedupError('TRACE_INVALID', `${path} has ${size} bytes; at most ${MAX_TRACE_BYTES} are read`);
      text = await file.readFile('latin1');
    } catch (error) {
      if (error instanceof DedupError) throw error;
      throw wrapError(error, `reading ${path}`, 'STORE_IO');
    }
    return parseTrace(text, path);
  }

  /** All traces, latest first, by their heads. Files that are no traces are left out. */
  async list(): Promise<TraceInfo[]> {
    const found: TraceInfo[] = [];
    for (const name of await this.#files()) {
      const file = join(this.directory, name);
      try {
        const { size, text } = await readHead(file);
        const { layers, repository, tag, manifest, runs, updatedMs } = parseTrace(wholeLines(text), file);
        found.push({ id: traceId(layers), file, bytes: size, repository, tag, manifest, runs, updatedMs });
      } catch {
        // Somebody else's file, or gone since.
      }
    }
    return found.sort((a, b) => b.updatedMs - a.updatedMs);
  }

  /** Writes a trace in place of that of the same image. Errors: STORE_IO, STORE_FULL. */
  async save(trace: AccessTrace): Promise<string> {
    const id = traceId(trace.layers);
    const name = this.#fileName(trace);
    const path = join(this.directory, name);
    const temporary = `${path}.tmp-${process.pid}-${this.#saved++}`;
    try {
      await mkdir(this.directory, { recursive: true, mode: 0o700 });
      // Not synced: what a power cut leaves of a hint is a hint that does not parse.
      await using file = await open(temporary, 'wx', 0o600);
      await file.writeFile(formatTrace(trace), 'latin1');
      await rename(temporary, path);
    } catch (error) {
      await rm(temporary, { force: true });
      const full = ['ENOSPC', 'EDQUOT'].includes((error as NodeJS.ErrnoException).code ?? '');
      throw wrapError(error, `writing ${path}`, full ? 'STORE_FULL' : 'STORE_IO');
    }
    // Under the name it had before it was pulled by this tag.
    for (const other of await this.#files())
      if (other !== name && other.endsWith(`-${id.slice(0, 16)}${SUFFIX}`))
        // What cannot be removed like a file is somebody else's, and is no trace.
        await rm(join(this.directory, other), { force: true }).catch(() => undefined);
    await this.#prune();
    return path;
  }

  async #prune(): Promise<void> {
    // Of writers that were killed.
    for (const name of await readdir(this.directory)) {
      if (!HALF_WRITTEN.test(name)) continue;
      const path = join(this.directory, name);
      const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Number.POSITIVE_INFINITY }));
      if (Date.now() - mtimeMs > HALF_WRITTEN_MS) await rm(path, { force: true });
    }
    const files = await this.#files();
    if (files.length <= MAX_TRACES) return;
    for (const { file } of (await this.list()).slice(MAX_TRACES)) await rm(file, { force: true });
  }

  /** Deletes the trace of an image; false when there is none. */
  async remove(id: string): Promise<boolean> {
    const names = (await this.#files()).filter((file) => file.endsWith(`-${id.slice(0, 16)}${SUFFIX}`));
    for (const name of names) await rm(join(this.directory, name), { force: true });
    return names.length > 0;
  }
}

/** A file, and nothing that would have us wait: a pipe nobody writes to holds a thread for good. Errors: those of open(2). */
async function openFile(path: string): Promise<FileHandle> {
  const file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
  if ((await file.stat()).isFile()) return file;
  await file.close();
  throw new DedupError('STORE_IO', `${path} is not a file`);
}

async function readHead(path: string): Promise<{ readonly size: number; readonly text: string }> {
  await using file = await openFile(path);
  const { size } = await file.stat();
  const { bytesRead, buffer } = await file.read(Buffer.alloc(HEAD_BYTES), 0, HEAD_BYTES, 0);
  return { size, text: buffer.toString('latin1', 0, bytesRead) };
}

/** Without a last line that is cut off. */
function wholeLines(text: string): string {
  return text.slice(0, text.lastIndexOf('\n') + 1);
}
