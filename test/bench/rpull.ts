// What a lazy pull costs, as seen from outside: from the start of the `rpull` process to its end, with the requests the
// registry answered. A real registry, containerd and product; every round finds a node that knows nothing of the image, and
// nothing is fetched ahead: that is measured with the starts of containers.
//   node test/bench/rpull.ts [--rounds 10] [--rtt MILLISECONDS]
// With --rtt the registry is behind a relay that delays what passes by half of it each way, and the first bytes of a
// connection by a whole one more for its handshake. That shows dependent round trips; it does not show slow start.
import { existsSync, readdirSync } from 'node:fs';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { cpuSeconds } from '../../src/bench/process-use.ts';
import { TestContainerd, waitFor } from '../support/containerd.ts';
import { debianImages, PYTHON_IMAGE } from '../support/debian-images.ts';
import { pushLayout } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '10' }, rtt: { type: 'string', default: '0' } },
});
const ROUNDS = Number(values.rounds);
const RTT_MS = Number(values.rtt);

/** Passes bytes on in their order, each `delayMs` after it came. */
function relay(from: Socket, to: Socket, delayMs: number, firstDelayMs: number): void {
  let dueMs = performance.now() + firstDelayMs;
  const later = (action: () => void): void => {
    dueMs = Math.max(dueMs, performance.now() + delayMs);
    setTimeout(action, dueMs - performance.now());
  };
  from.on('data', (data) => later(() => to.write(data)));
  from.on('end', () => later(() => to.end()));
  from.on('error', () => to.destroy());
}

async function slowLink(port: number, rttMs: number): Promise<Server> {
  const server = createServer({ noDelay: true, allowHalfOpen: true }, (client) => {
    const upstream = connect({ port, host: '127.0.0.1', noDelay: true, allowHalfOpen: true });
    relay(client, upstream, rttMs / 2, rttMs * 1.5);
    relay(upstream, client, rttMs / 2, 0);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return server;
}

function quartiles(of: readonly number[]): string {
  const sorted = [...of].sort((a, b) => a - b);
  const at = (q: number): string =>
    (sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? 0).toFixed(0);
  return `${at(0.5)} ms (${at(0.25)}–${at(0.75)})`;
}

const registry = await RegistryProcess.start();
const product = await Product.create({ log_level: 'info', prefetch: { enabled: false } });
let containerd: TestContainerd | undefined;
let link: Server | undefined;
try {
  const { dir } = await debianImages([PYTHON_IMAGE], console.log);
  const plain = await pushLayout(dir, PYTHON_IMAGE.tag, registry.host, 'python', 'plain');
  await product.cli(['index', plain, '--annotate', `${registry.host}/python:lazy`]);
  await product.start();
  containerd = await TestContainerd.start({ proxies: { dedup: product.address } });
  let host = registry.host;
  if (RTT_MS > 0) {
    link = await slowLink(registry.port, RTT_MS);
    host = `127.0.0.1:${(link.address() as AddressInfo).port}`;
  }
  const reference = `${host}/python:lazy`;
  const snapshots = new SnapshotsClient(product.address);
  const daemon = await product.daemonPid();
  const pullsMs: number[] = [];
  const daemonCpuMs: number[] = [];
  let requests = '';
  for (let round = 0; round <= ROUNDS; round++) {
    const before = registry.logs.length;
    const cpuBefore = cpuSeconds(daemon, { children: false });
    const startedMs = performance.now();
    await product.cli(['rpull', '-a', containerd.address, '-n', containerd.namespace, reference]);
    const tookMs = performance.now() - startedMs;
    // The first round also brings the daemon's own first compilation and connections.
    if (round === 0) console.log(`first pull after the daemon's start: ${tookMs.toFixed(0)} ms`);
    else {
      pullsMs.push(tookMs);
      daemonCpuMs.push((cpuSeconds(daemon, { children: false }) - cpuBefore) * 1000);
    }
    const lines = registry.logs.slice(before).matchAll(/"(GET|HEAD) (\/v2\/\S*) HTTP/g);
    requests = [...lines].map(([, method, path]) => `  ${method} ${path}`).join('\n');
    await containerd.ctr(['image', 'rm', '--sync', reference]);
    await snapshots.cleanup();
    const indexes = join(product.root, 'images', 'layers');
    await waitFor('the node to have forgotten the image', async () => {
      if (!existsSync(indexes) || readdirSync(indexes).length === 0) return true;
      await snapshots.cleanup();
      return false;
    });
  }
  snapshots.close();
  console.log(`rpull, ${ROUNDS} rounds, round trip ${RTT_MS} ms: ${quartiles(pullsMs)}`);
  console.log(`CPU of dedupd in that time: ${quartiles(daemonCpuMs)}`);
  console.log(`requests of the last round:\n${requests}`);
} finally {
  await containerd?.stop();
  await product.stop();
  link?.close();
  await registry.stop();
}
