// Every transport and layout that this kernel can mount, held to one suite; those that can let go of images that are here
// completely also as they are without that.
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { parseConfig } from '../../src/config.ts';
import { DataPlane } from '../../src/fs/data-plane.ts';
import type { ErofsLayoutKind } from '../../src/fs/transport/transport.ts';
import { createLogger } from '../../src/log.ts';
import { RootPaths, RunPaths } from '../../src/paths.ts';
import { descriptorsOf, type OpenTransport, transportSuite } from '../suites/transport.ts';
import { Product } from '../support/product.ts';

/** What is not read yet is not here. */
const NO_GUESSES = { prefetch: { enabled: false } };

/** In this process: our own session answers hits on threads of its own. */
function inProcess(layout: ErofsLayoutKind, direct: boolean): OpenTransport {
  return async ({ dir, chunkBytes }) => {
    await mkdir(join(dir, 'root'), { recursive: true });
    const plane = await DataPlane.open({
      config: parseConfig({
        root: join(dir, 'root'),
        ...NO_GUESSES,
        transport: 'fuse',
        direct_mounts: direct,
        chunk_size: chunkBytes,
      }),
      paths: new RootPaths(join(dir, 'root')),
      run: new RunPaths(join(dir, 'run')),
      log: createLogger('test', { level: 'error', fd: 2 }),
      layout,
    });
    return {
      mount: async (reference, directory) => {
        const request = { reference, directory, platform: '', credentials: '' };
        await plane.mountReference(request, () => {}, AbortSignal.timeout(60_000));
      },
      unmount: (directory) => plane.unmountReference(directory),
      descriptors: () => descriptorsOf('self'),
      close: () => plane.close(),
    };
  };
}

/** As an operator runs it: fuse-native cannot give its thread back before the process ends. */
function asProduct(config: Readonly<Record<string, unknown>>): OpenTransport {
  return async ({ dir, chunkBytes }) => {
    const product = await Product.create({ ...NO_GUESSES, ...config, root: join(dir, 'root'), chunk_size: chunkBytes });
    await product.start();
    const pid = await product.daemonPid();
    return {
      mount: async (reference, directory) => void (await product.cli(['mount', reference, directory])),
      unmount: async (directory) => void (await product.cli(['umount', directory])),
      descriptors: () => descriptorsOf(pid),
      close: () => product.stop(),
    };
  };
}

transportSuite('transport fuse, device layout', inProcess('device', false));
transportSuite('transport fuse, flat layout of kernels before 5.16', inProcess('flat', false));
transportSuite('transport fuse, images read directly, device layout', inProcess('device', true));
transportSuite('transport fuse-native, device layout', asProduct({ transport: 'fuse-native' }));
