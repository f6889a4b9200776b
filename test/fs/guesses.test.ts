// What the loader fetches around the misses of a start, that it does so only where the link has room, and that guesses
// change no byte.
import assert from 'node:assert/strict';
import { afterEach, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { LazyLoaderOptions } from '../../src/fs/lazy-loader.ts';
import { KiB } from '../../src/units.ts';
import { LoaderRig, layerOf, MemoryBlobs, noise, type StoredTestLayer } from '../support/lazy-store.ts';

const SPAN_BYTES = 128 * KiB;
const FILES = 96;

describe('guesses of the LazyLoader', () => {
  const rigs: LoaderRig[] = [];
  afterEach(async () => {
    for (const rig of rigs.splice(0)) await rig.remove();
  });

  /** A layer of files that fill a span each, behind a link with a round trip and a rate. */
  async function behind(
    link: { roundTripMs: number; bytesPerMs: number },
    options: Partial<LazyLoaderOptions>,
  ): Promise<{ rig: LoaderRig; stored: StoredTestLayer; registry: MemoryBlobs }> {
    const files = Array.from({ length: FILES }, (_, i) => ({
      name: `f${i}`,
      content: noise(`guess${i}`, SPAN_BYTES - 1024),
    }));
    files.push({ name: 'last', content: noise('last', KiB) });
    const layer = await layerOf(files, { compression: 'none', spanBytes: SPAN_BYTES, chunkBytes: 512 * KiB });
    const registry = new MemoryBlobs(layer);
    registry.misbehave = async ({ range }) => {
      await sleep(link.roundTripMs + range.length / link.bytesPerMs);
      return undefined;
    };
    const rig = await LoaderRig.create(options);
    rigs.push(rig);
    const stored = await rig.add(layer, [{ host: 'one', reader: registry }]);
    return { rig, stored, registry };
  }

  /** Reads some files in the order of a program that jumps about. */
  async function start(rig: LoaderRig, stored: StoredTestLayer): Promise<void> {
    // The last span of the archive is a short one: it shows the round trip.
    await rig.readFile(stored, 'last');
    for (let i = 0; i < 24; i++) {
      const file = (i * 37) % FILES;
      const read = await rig.readFile(stored, `f${file}`);
      assert.ok(read.equals(stored.layer.files[file]!.content), `f${file} differs`);
    }
  }

  it('fetches around misses where a round trip carries many spans', async () => {
    const fast = await behind({ roundTripMs: 20, bytesPerMs: 100_000 }, { guess: true });
    await start(fast.rig, fast.stored);
    const { aheadBytes, misses } = fast.rig.loader.stats();
    assert.ok(aheadBytes >= 4 * SPAN_BYTES, `${aheadBytes} bytes were guessed`);
    assert.ok(misses < 25, `${misses} of 25 files were waited for`);
    await fast.rig.mustEqual(fast.stored);
  });

  it('guesses nothing where the link is full with what is waited for', async () => {
    const slow = await behind({ roundTripMs: 5, bytesPerMs: 10_000 }, { guess: true });
    await start(slow.rig, slow.stored);
    assert.equal(slow.rig.loader.stats().aheadBytes, 0);
  });

  it('guesses nothing when it is not to', async () => {
    const quiet = await behind({ roundTripMs: 20, bytesPerMs: 100_000 }, { guess: false });
    await start(quiet.rig, quiet.stored);
    assert.equal(quiet.rig.loader.stats().aheadBytes, 0);
    assert.ok(quiet.registry.requests.length <= 25);
  });
});
