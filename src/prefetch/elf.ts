// What the kernel and the dynamic linker will read of an ELF file before its first instruction runs. Pure parsing of
// bytes handed in by start-files.ts; damaged files give nothing. Formats: elf(5), System V ABI "Dynamic Linking".

/** What the file header and program headers say; offsets and lengths in bytes of the file. */
export interface ElfHeader {
  readonly interpreter: ElfRange | undefined;
  readonly dynamic: ElfRange | undefined;
  readonly segments: readonly (ElfRange & { readonly address: number; readonly writable: boolean })[];
}

export interface ElfRange {
  readonly offset: number;
  readonly length: number;
}

/** Libraries an ELF file names, and where it says to look for them first. */
export interface ElfNeeds {
  readonly libraries: readonly string[];
  /** DT_RUNPATH or DT_RPATH, "$ORIGIN" not yet replaced. */
  readonly searchPath: readonly string[];
}

const PT_LOAD = 1;
const PT_DYNAMIC = 2;
const PT_INTERP = 3;
const PF_W = 2;
const DT_NEEDED = 1;
const DT_STRTAB = 5;
const DT_STRSZ = 10;
const DT_RPATH = 15;
const DT_RUNPATH = 29;
const PROGRAM_HEADER_BYTES = 56;
/** Longest string table that is worth reading, bytes. */
const MAX_STRINGS = 1 << 20;
/** Longest name in it (PATH_MAX), and how many are believed: real programs have a few dozen. */
const MAX_NAME_BYTES = 4096;
const MAX_LIBRARIES = 200;
const MAX_SEARCH_PATH = 32;

/** Of a 64-bit little-endian ELF file, from its first bytes; undefined for anything else. */
export function parseElfHeader(head: Buffer): ElfHeader | undefined {
  if (head.length < 64 || head.readUInt32BE(0) !== 0x7f454c46 || head[4] !== 2 || head[5] !== 1) return undefined;
  const tableAt = Number(head.readBigUInt64LE(32));
  const entryBytes = head.readUInt16LE(54);
  const count = head.readUInt16LE(56);
  if (entryBytes < PROGRAM_HEADER_BYTES || tableAt + count * entryBytes > head.length) return undefined;
  let interpreter: ElfRange | undefined;
  let dynamic: ElfRange | undefined;
  const segments: { offset: number; length: number; address: number; writable: boolean }[] = [];
  for (let i = 0; i < count; i++) {
    const at = tableAt + i * entryBytes;
    const range = { offset: Number(head.readBigUInt64LE(at + 8)), length: Number(head.readBigUInt64LE(at + 32)) };
    const type = head.readUInt32LE(at);
    if (type === PT_INTERP) interpreter = range;
    else if (type === PT_DYNAMIC) dynamic = range;
    else if (type === PT_LOAD) {
      const writable = (head.readUInt32LE(at + 4) & PF_W) !== 0;
      segments.push({ ...range, address: Number(head.readBigUInt64LE(at + 16)), writable });
    }
  }
  return { interpreter, dynamic, segments };
}

/** Where the dynamic section's strings lie in the file; undefined when it names none. */
export function stringTable(dynamic: Buffer, header: ElfHeader): ElfRange | undefined {
  const entries = dynamicEntries(dynamic);
  const address = entries.find(({ tag }) => tag === DT_STRTAB)?.value;
  const length = entries.find(({ tag }) => tag === DT_STRSZ)?.value;
  if (address === undefined || length === undefined || length > MAX_STRINGS) return undefined;
  const segment = header.segments.find((s) => address >= s.address && address + length <= s.address + s.length);
  return segment && { offset: segment.offset + address - segment.address, length };
}

export function parseNeeds(dynamic: Buffer, strings: Buffer): ElfNeeds {
  const text = (at: number): string => {
    const name = strings.subarray(at, at + MAX_NAME_BYTES);
    const end = name.indexOf(0);
    return end < 0 ? '' : name.toString('latin1', 0, end);
  };
  const entries = dynamicEntries(dynamic);
  const named = (...tags: number[]): string[] =>
    entries
      .filter(({ tag }) => tags.includes(tag))
      .slice(0, MAX_LIBRARIES)
      .map(({ value }) => text(value));
  // ld.so(8): DT_RPATH counts only where there is no DT_RUNPATH.
  const runPath = named(DT_RUNPATH);
  const searchPath = (runPath.length > 0 ? runPath : named(DT_RPATH)).flatMap((list) => list.split(':'));
  return {
    libraries: named(DT_NEEDED).filter((name) => name !== ''),
    searchPath: searchPath.filter((directory) => directory !== '').slice(0, MAX_SEARCH_PATH),
  };
}

function dynamicEntries(dynamic: Buffer): { tag: number; value: number }[] {
  const entries: { tag: number; value: number }[] = [];
  for (let at = 0; at + 16 <= dynamic.length; at += 16) {
    const tag = Number(dynamic.readBigInt64LE(at));
    if (tag === 0) break;
    entries.push({ tag, value: Number(dynamic.readBigUInt64LE(at + 8)) });
  }
  return entries;
}
