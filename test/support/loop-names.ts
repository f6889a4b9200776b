// Which loop devices of the machine belong to which store, by the names that they were attached with. Others may run the
// same tests beside this one.
import { existsSync, readdirSync } from 'node:fs';
import { StoreFile } from '../../src/fs/chunks/store-file.ts';
import { DEFAULT_STORE_BYTES, FIRST_CHUNK_ADDRESS } from '../../src/fs/chunks/store-layout.ts';
import { native } from '../../src/fs/native.ts';
import type { RootPaths } from '../../src/paths.ts';

/** All attached loop devices, by path, with the name that each was attached with. */
export async function loopNames(): Promise<Map<string, string>> {
  const found = new Map<string, string>();
  for (const device of readdirSync('/sys/block').filter((name) => name.startsWith('loop'))) {
    if (!existsSync(`/sys/block/${device}/loop/backing_file`)) continue;
    const path = `/dev/${device}`;
    // Gone meanwhile: not attached.
    const status = await native()
      .loopStatus(path)
      .catch(() => undefined);
    if (status !== undefined) found.set(path, status.name);
  }
  return found;
}

/** What the devices of a root are named after; its store exists. */
export async function storeIdOf(paths: RootPaths): Promise<string> {
  const { store } = await StoreFile.open(paths, DEFAULT_STORE_BYTES, FIRST_CHUNK_ADDRESS);
  await store.close();
  return store.name;
}

/** Paths of the devices of a store. */
export async function devicesOfStore(storeId: string): Promise<string[]> {
  return [...(await loopNames())].filter(([, name]) => name.includes(storeId)).map(([path]) => path);
}
