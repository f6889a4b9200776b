// Fetches what the start of an image's own command is certain to read, before anyone starts it: the program, the script
// interpreter, the dynamic linker and the libraries they name, and the few files every container runtime looks into.
// Called by dedupd once an image's metadata is built; a hint only, so that every failure ends it silently.
import { BLOCK_BYTES, type ByteRange, KiB, MiB } from '../units.ts';
import { type ElfHeader, parseElfHeader, parseNeeds, stringTable } from './elf.ts';

/** What an image's configuration says about its process (OCI image-spec config.md). */
export interface StartCommand {
  readonly entrypoint: readonly string[];
  readonly cmd: readonly string[];
  /** "NAME=value". */
  readonly env: readonly string[];
  readonly workingDir: string;
}

export interface StartFile {
  readonly path: string;
  readonly size: number;
  /** Where bytes of it lie in the store. */
  ranges(offset: number, length: number): ByteRange[];
}

/** The image's tree. */
export interface StartTree {
  file(path: string, from?: string): StartFile | undefined;
}

/** Brings ranges of the store here and, for `read`, gives their bytes. Errors: any. */
export interface StartFetcher {
  ensure(ranges: readonly ByteRange[]): Promise<void>;
  read(ranges: readonly ByteRange[]): Promise<Buffer>;
}

/** Of files larger than this only the parts that loading them touches are fetched, bytes. */
const WHOLE_FILE_BYTES = 8 * MiB;
/** Of such a file: its beginning, which holds headers, symbols and relocations. */
const HEAD_BYTES = 2 * MiB;
/** Where an end is put to it, bytes of files. */
const MAX_BYTES = 48 * MiB;
const MAX_FILES = 200;
/** Paths that are looked up; a command or a library path can name any number. */
const MAX_LOOK_UPS = 2000;
/** Longest dynamic section that is read, bytes. */
const MAX_DYNAMIC_BYTES = 64 * KiB;
/** First bytes of a file that are looked at. */
const LOOK_BYTES = 4096;

/** Looked into by runtimes (users and groups), by the dynamic linker and by the C library of nearly every program. */
const ALWAYS = ['etc/passwd', 'etc/group', 'etc/ld.so.cache', 'etc/nsswitch.conf'];
const DEFAULT_PATH = 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
/** Where dynamic linkers look by default; the architecture's own name stands for `*` (ld.so(8), Debian multiarch). */
const LIBRARY_DIRECTORIES = ['lib/*', 'usr/lib/*', 'lib64', 'usr/lib64', 'lib', 'usr/lib', 'usr/local/lib'];
const MULTIARCH = process.arch === 'arm64' ? 'aarch64-linux-gnu' : 'x86_64-linux-gnu';

/** Fetches the files of one start. Resolves when all that could be fetched is here; never rejects. */
export async function fetchStartFiles(
  tree: StartTree,
  command: StartCommand,
  fetcher: StartFetcher,
): Promise<StartFilesResult> {
  const start = new StartFiles(tree, command, fetcher);
  await start.run();
  return { files: start.files, bytes: start.bytes };
}

export interface StartFilesResult {
  readonly files: number;
  /** Bytes of the files' parts that were asked for. */
  readonly bytes: number;
}

class StartFiles {
  files = 0;
  bytes = 0;
  readonly #tree: StartTree;
  readonly #command: StartCommand;
  readonly #fetcher: StartFetcher;
  readonly #seen = new Set<string>();
  #lookUps = 0;

  constructor(tree: StartTree, command: StartCommand, fetcher: StartFetcher) {
    this.#tree = tree;
    this.#command = command;
    this.#fetcher = fetcher;
  }

  async run(): Promise<void> {
    const { entrypoint, cmd, workingDir } = this.#command;
    const wanted: Promise<void>[] = ALWAYS.map((path) => begun(this.#bring(this.#file(path))));
    for (const words of [entrypoint, cmd]) {
      // The first word is a program; others may be scripts, configuration, or programs that an entrypoint executes.
      for (const [i, word] of words.entries()) {
        const file = i === 0 ? this.#program(word) : word.includes('/') ? this.#file(word, workingDir) : undefined;
        if (file !== undefined) wanted.push(begun(this.#load(file)));
      }
    }
    // Each is a hint of its own: one that fails leaves the others alone.
    await Promise.allSettled(wanted);
  }

  /** What the tree has at a path; nothing once enough was looked up, or where its metadata is damaged. */
  #file(path: string, from?: string): StartFile | undefined {
    if (++this.#lookUps > MAX_LOOK_UPS) return undefined;
    try {
      return this.#tree.file(path, from);
    } catch {
      return undefined; // Whoever mounts the image is told.
    }
  }

  /** A program by the name the command gives: a path, or a name looked up in PATH. */
  #program(word: string): StartFile | undefined {
    if (word.includes('/')) return this.#file(word, this.#command.workingDir);
    const path = this.#command.env.find((line) => line.startsWith('PATH=')) ?? DEFAULT_PATH;
    for (const directory of path.slice('PATH='.length).split(':')) {
      const file = this.#file(`${directory}/${word}`);
      if (file !== undefined) return file;
    }
    return undefined;
  }

  /** A file that is executed or loaded, and what it needs in turn. */
  async #load(file: StartFile | undefined): Promise<void> {
    if (file === undefined || this.#seen.has(file.path) || this.#seen.size >= MAX_FILES) return;
    this.#seen.add(file.path);
    if (file.size === 0) return;
    const whole = file.size <= WHOLE_FILE_BYTES;
    const bringing = begun(this.#bringPart(file, 0, whole ? file.size : HEAD_BYTES));
    const head = await this.#read(file, 0, LOOK_BYTES);
    const header = parseElfHeader(head);
    const further: Promise<void>[] = [bringing];
    if (header !== undefined) further.push(this.#loadElf(file, header, whole));
    else if (head.toString('latin1', 0, 2) === '#!') further.push(this.#loadInterpreter(head));
    await Promise.all(further);
  }

  async #loadInterpreter(head: Buffer): Promise<void> {
    // execve(2): the interpreter's path, then at most one argument.
    const [line = ''] = head.toString('latin1', 2).split('\n', 1);
    const [interpreter = '', argument = ''] = line.trim().split(/\s+/);
    const wanted = [begun(this.#load(this.#file(interpreter)))];
    if (interpreter.endsWith('/env') && argument !== '') wanted.push(begun(this.#load(this.#program(argument))));
    await Promise.all(wanted);
  }

  async #loadElf(file: StartFile, header: ElfHeader, whole: boolean): Promise<void> {
    const further: Promise<void>[] = [];
    if (!whole) {
      // Relocations are written there before the program runs.
      for (const { offset, length } of header.segments.filter(({ writable }) => writable))
        further.push(begun(this.#bringPart(file, offset, length)));
    }
    if (header.interpreter !== undefined) {
      const path = await this.#read(file, header.interpreter.offset, Math.min(header.interpreter.length, LOOK_BYTES));
      further.push(begun(this.#load(this.#file(path.toString('latin1').replace(/\0.*$/s, '')))));
    }
    if (header.dynamic !== undefined && header.dynamic.length <= MAX_DYNAMIC_BYTES) {
      const dynamic = await this.#read(file, header.dynamic.offset, header.dynamic.length);
      const strings = stringTable(dynamic, header);
      if (strings !== undefined) {
        const needs = parseNeeds(dynamic, await this.#read(file, strings.offset, strings.length));
        const origin = file.path.replace(/\/?[^/]*$/, '');
        const first = needs.searchPath.map((directory) => directory.replace(/\$\{?ORIGIN\}?/g, `/${origin}`));
        for (const library of needs.libraries) further.push(begun(this.#load(this.#library(library, first))));
      }
    }
    await Promise.all(further);
  }

  #library(name: string, first: readonly string[]): StartFile | undefined {
    if (name.includes('/')) return this.#file(name);
    for (const directory of [...first, ...LIBRARY_DIRECTORIES]) {
      const file = this.#file(`/${directory.replace('*', MULTIARCH)}/${name}`);
      if (file !== undefined) return file;
    }
    return undefined;
  }

  async #bring(file: StartFile | undefined): Promise<void> {
    if (file !== undefined) await this.#bringPart(file, 0, Math.min(file.size, HEAD_BYTES));
  }

  async #bringPart(file: StartFile, offset: number, length: number): Promise<void> {
    const part = Math.min(length, file.size - offset);
    if (part <= 0 || this.bytes + part > MAX_BYTES) return;
    this.files++;
    this.bytes += part;
    await this.#fetcher.ensure(file.ranges(offset, part));
  }

  /** Bytes of a file; fewer at its end or where it has holes. */
  async #read(file: StartFile, offset: number, length: number): Promise<Buffer> {
    const end = Math.min(file.size, offset + length);
    if (end <= offset || this.bytes + end - offset > MAX_BYTES) return Buffer.alloc(0);
    const bytes = await this.#fetcher.read(file.ranges(offset, end - offset));
    const skip = offset % BLOCK_BYTES;
    return bytes.subarray(skip, skip + end - offset);
  }
}

/** Something that goes on beside what follows; its failure is seen by whoever awaits it later, or else passed over. */
function begun(work: Promise<void>): Promise<void> {
  work.catch(() => undefined);
  return work;
}
