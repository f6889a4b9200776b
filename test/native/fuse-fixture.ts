// A FUSE session over a small store with known content, and a direct-I/O loop device over one of its files.
import { createHash, randomBytes } from 'node:crypto';
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readlinkSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type FuseMiss, type FuseSession, type LoopDevice, native } from '../../src/fs/native.ts';
import { blockSums } from '../support/block-sums.ts';

export const BLOCK = 4096;
export const HEAD = 1 << 20;
export const TAIL = 4 << 20;
export const STORE = 64 << 20;

export interface Fixture {
  readonly dir: string;
  readonly session: FuseSession;
  readonly device: LoopDevice;
  readonly presence: Uint8Array;
  /** Where hits leave the second in which they came. */
  readonly touched: Uint32Array;
  /** What the whole store shows when everything is present: zeros at the edges. */
  readonly content: Buffer;
  readonly misses: FuseMiss[];
  readonly storePath: string;
  readonly sumsPath: string;
  digest(offset: number, length: number): string;
  /** Marks a range as verified; the bytes are in the store from the start. */
  present(offset: number, length: number): void;
  attach(file: number): Promise<LoopDevice>;
  close(): Promise<void>;
}

export interface FixtureOptions {
  readonly threads?: number;
  readonly storeBytes?: number;
  readonly onMiss?: (fixture: Fixture, misses: FuseMiss[]) => void;
  readonly onEnd?: (errno: number) => void;
}

export function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

/** Descriptors of this process, by what they point to, without pipes and sockets, which come and go with children. */
export function descriptors(): string[] {
  const targets: string[] = [];
  for (const name of readdirSync('/proc/self/fd')) {
    try {
      targets.push(readlinkSync(`/proc/self/fd/${name}`));
    } catch {
      // The descriptor that read the directory.
    }
  }
  return targets.filter((target) => !/^(pipe|socket):/.test(target)).sort();
}

let made: { readonly content: Buffer; readonly sums: Buffer } | undefined;

/** Random content between the edges, with its sums; the same for every fixture of this process. */
function storeContent(): { readonly content: Buffer; readonly sums: Buffer } {
  if (made === undefined) {
    const content = Buffer.alloc(STORE);
    content.set(randomBytes(STORE - HEAD - TAIL), HEAD);
    made = { content, sums: blockSums(content) };
  }
  return made;
}

export async function startFixture(options: FixtureOptions = {}): Promise<Fixture> {
  const addon = native();
  const storeBytes = options.storeBytes ?? STORE;
  const dir = mkdtempSync(join(tmpdir(), 'dedup-fuse-'));
  const mountDir = join(dir, 'mnt');
  mkdirSync(mountDir, { mode: 0o700 });
  const storePath = join(dir, 'store');
  const { content, sums } = storeContent();
  const writer = openSync(storePath, 'w');
  writeSync(writer, content);
  closeSync(writer);
  truncateSync(storePath, storeBytes);
  const storeFd = openSync(storePath, 'r');
  const sumsPath = join(dir, 'sums');
  writeFileSync(sumsPath, sums);
  const sumsFd = openSync(sumsPath, 'r');
  const presence = addon.presenceCreate(storeBytes);
  const touched = addon.touchedCreate(storeBytes);
  const misses: FuseMiss[] = [];
  const devices: string[] = [];
  let fixture: Fixture | undefined;
  const session = await addon.fuseStart({
    mountDir,
    storeFd,
    sumsFd,
    storeBytes,
    headBytes: HEAD,
    tailBytes: TAIL,
    presence,
    touched,
    threads: options.threads ?? 3,
    maxBackground: 512,
    onMiss: (batch) => {
      misses.push(...batch);
      options.onMiss?.(fixture!, batch);
    },
    onEnd: options.onEnd ?? (() => {}),
  });
  const attach = async (file: number): Promise<LoopDevice> => {
    const fd = await session.openFile(file);
    try {
      const device = await addon.loopAttach({
        fd,
        readOnly: true,
        directIo: true,
        offset: 0,
        sizeLimit: 0,
        blockSize: BLOCK,
        autoclear: false,
        name: `fuse-test-${file}`,
      });
      devices.push(device.path);
      return device;
    } finally {
      closeSync(fd);
    }
  };
  const close = async (): Promise<void> => {
    await session.close();
    for (const path of devices.splice(0)) await addon.loopDetach(path);
    closeSync(storeFd);
    closeSync(sumsFd);
    rmSync(dir, { recursive: true, force: true });
  };
  try {
    const result: Fixture = {
      dir,
      session,
      device: await attach(7),
      presence,
      touched,
      content,
      misses,
      storePath,
      sumsPath,
      digest: (offset, length) => sha256(content.subarray(offset, offset + length)),
      present: (offset, length) => addon.presenceSet(presence, offset / BLOCK, length / BLOCK, true),
      attach,
      close,
    };
    fixture = result;
    return result;
  } catch (error) {
    await close();
    throw error;
  }
}
