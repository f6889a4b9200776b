// What happens when either process, or both, or the machine, goes away and comes back with no container running, and
// what an orderly stop leaves: nothing. Real containerd, runc, registry and product.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { LABEL_IMAGE_REF, LABEL_INDEX, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF } from '../../src/snapshotter/labels.ts';
import { mountsBelow, run, unmountBelow, waitFor } from '../support/containerd.ts';
import type { TestImage } from '../support/images.ts';
import { FILE_BYTES, LazyNode, noiseSum, smallLayers } from '../support/lazy-node.ts';
import { PROGRAM } from '../support/product.ts';

const DAEMON = join(PROGRAM, '..', 'dedupd');

/** Numbers of the FUSE connections a process holds (fdinfo of /dev/fuse); the loop devices over one have it as minor. */
function fuseConnections(pid: number): string[] {
  const found = new Set<string>();
  for (const fd of readdirSync(`/proc/${pid}/fdinfo`)) {
    try {
      const number = /^fuse_connection:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8'))?.[1];
      if (number !== undefined) found.add(number);
    } catch {
      // Closed meanwhile.
    }
  }
  return [...found];
}

/** Loop devices over files of these FUSE connections. */
function loopsOver(connections: readonly string[]): string[] {
  const listed = execFileSync('losetup', ['-n', '-l', '-O', 'NAME,BACK-MAJ:MIN'], { encoding: 'utf8' });
  return listed.split('\n').filter((line) => connections.some((number) => line.trim().endsWith(` 0:${number}`)));
}

function isRunning(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

describe('a restart with no container running', () => {
  let node: LazyNode;
  let image: TestImage;
  let lazy: string;
  let plain: string;

  before(async () => {
    node = await LazyNode.start();
    ({ image, lazy, plain } = await node.publish('team/app', await smallLayers('whole')));
  });
  after(() => node?.stop());

  const stops = {
    'the service': (signal: NodeJS.Signals) => node.product.stopService(signal),
    dedupd: (signal: NodeJS.Signals) => node.product.stopDaemon(signal),
    both: async (signal: NodeJS.Signals) => {
      await node.product.stopService(signal);
      await node.product.stopDaemon(signal);
    },
  } as const;

  async function daemonAnswers(): Promise<void> {
    await waitFor('dedupd', () =>
      node.product.daemonPid().then(
        () => true,
        () => false,
      ),
    );
  }

  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    for (const [name, stop] of Object.entries(stops)) {
      test(`of ${name} by ${signal}: a lazy image pulled before runs, what was read is still right, the rest is fetched`, async () => {
        await node.rpull(lazy);
        assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
        const sessions = fuseConnections(await node.product.daemonPid());
        await stop(signal);
        if (node.product.servicePid === undefined) await node.startService();
        node.proxy.reset();
        const { stdout } = await node.runScript(lazy, 'cat /mark; echo; sha256sum /cold');
        assert.equal(stdout, `whole\n${noiseSum(FILE_BYTES, 'cold whole', '/cold')}`);
        // Everything the first run needed of the bottom layer was recorded, unless the process had no time to.
        if (signal === 'SIGTERM') assert.equal(node.fetched(image)[0], 0);
        await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
        await node.collect();
        assert.deepEqual(node.loops(), []);
        // A number that a new session has got was given back by the old one.
        const own = fuseConnections(await node.product.daemonPid());
        assert.deepEqual(loopsOver(sessions.filter((number) => !own.includes(number))), []);
      });
    }
  }

  test('of the machine: mounts, devices and the run directory are gone, and a container made before starts', async () => {
    await node.rpull(lazy);
    const command = ['/bin/sha256sum', '/cold'];
    await node.containerd.ctr(['container', 'create', '--snapshotter', 'dedup', lazy, 'kept', ...command]);
    const pid = await node.product.daemonPid();
    const sessions = fuseConnections(pid);
    assert.ok(loopsOver(sessions).length > 0);
    await node.containerd.down('SIGKILL');
    await node.product.stopService('SIGKILL');
    await node.product.stopDaemon('SIGKILL');
    await unmountBelow(node.product.dir);
    await waitFor('loop devices to go', () => node.loops().length === 0 && loopsOver(sessions).length === 0);
    await rm(node.product.runDir, { recursive: true });
    await node.product.start();
    await node.containerd.up();
    const { stdout } = await node.containerd.ctr(['task', 'start', 'kept']);
    assert.equal(stdout, noiseSum(FILE_BYTES, 'cold whole', '/cold'));
    await node.containerd.ctr(['task', 'rm', 'kept'], { allowFailure: true });
    await node.containerd.ctr(['container', 'rm', 'kept']);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.collect();
  });

  for (const way of ['SIGTERM', 'Shutdown'] as const) {
    test(`an orderly stop by ${way} leaves no mount, no device, no session and no process`, async () => {
      await node.rpull(lazy);
      await node.runScript(lazy, 'cat /mark');
      const pid = await node.product.daemonPid();
      const sessions = fuseConnections(pid);
      assert.ok(mountsBelow(node.product.root).length > 0 && loopsOver(sessions).length > 0);
      await node.product.stopService();
      assert.ok(isRunning(pid), 'dedupd goes on without the service');
      if (way === 'SIGTERM') await node.product.stopDaemon();
      else {
        await node.product.client.shutdown();
        await waitFor('dedupd to end', () => !isRunning(pid));
      }
      assert.deepEqual(mountsBelow(node.product.dir), []);
      assert.deepEqual(node.loops(), []);
      assert.deepEqual(loopsOver(sessions), []);
      assert.equal(existsSync(join(node.product.runDir, 'dedupd.sock')), false);
      await node.startService();
      await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
      await node.collect();
    });
  }

  test('a second dedupd on the same root ends with status 3 and says why', async () => {
    const first = await node.product.daemonPid();
    const { code, stdout, stderr } = await run(DAEMON, ['--config', node.product.configFile], { allowFailure: true });
    assert.equal(code, 3);
    assert.match(stdout + stderr, /another dedupd serves .*root/);
    assert.equal(await node.product.daemonPid(), first);
  });

  test('a dedupd that cannot start is tried five times within a minute, then given up loudly; ordinary layers work', async () => {
    await node.rpull(lazy);
    await node.product.stopService();
    await node.product.stopDaemon();
    // A file where it wants to make a directory: it ends at once.
    await node.product.configure({ run_dir: '/dev/null/run' });
    const serviceLog = () => readFileSync(node.product.logFile, 'utf8');
    const startedAt = serviceLog().length;
    await node.startService();
    await waitFor('giving up', () => serviceLog().slice(startedAt).includes('giving up on dedupd'), 40_000);
    const said = serviceLog().slice(startedAt);
    assert.equal(said.split('"msg":"started dedupd"').length - 1, 5);
    assert.match(said, /"level":"fatal".*giving up on dedupd; restart dedup-snapshotter/);
    assert.match(said, /dedupd ended 5 times within a minute/);

    const refused = await node.runScript(lazy, 'cat /mark', { allowFailure: true });
    assert.notEqual(refused.code, 0);
    assert.match(refused.stderr, /dedupd does not answer/);
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'dedup', plain]);
    assert.equal((await node.runScript(plain, 'cat /mark')).stdout, 'whole');
    await node.containerd.ctr(['image', 'rm', '--sync', plain]);

    await node.product.stopService();
    await node.product.configure({});
    await node.startService();
    await daemonAnswers();
    await node.collect();
  });

  /** Offers a layer as a client does that could take it lazily; it is to be unpacked. */
  async function offerLayer(): Promise<void> {
    const client = node.snapshots();
    try {
      const digest = image.layers[0]?.digest ?? '';
      const labels = {
        [LABEL_SNAPSHOT_REF]: image.layers[0]?.chainId ?? '',
        [LABEL_IMAGE_REF]: lazy,
        [LABEL_LAYER_DIGEST]: digest,
        [LABEL_INDEX]: digest,
      };
      assert.equal((await client.prepare('offered', '', labels)).length, 1);
      await client.remove('offered');
    } finally {
      client.close();
    }
  }

  async function pullAsUsual(): Promise<void> {
    await node.containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'dedup', lazy]);
  }

  test('"dedupd.enabled" false and none running: ordinary layers work, lazy ones are unavailable with the reason', async () => {
    await node.rpull(lazy);
    await node.product.stopService();
    await node.product.stopDaemon();
    await node.product.configure({ dedupd: { enabled: false } });
    await node.startService();
    const refused = await node.runScript(lazy, 'cat /mark', { allowFailure: true });
    assert.notEqual(refused.code, 0);
    assert.match(refused.stderr, /dedupd does not answer on .*start dedupd/);
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.containerd.gc();
    assert.match((await node.rpull(lazy, [], { allowFailure: true })).stderr, /UNAVAILABLE\]\n.*start the service/);
    await offerLayer();
    assert.match(node.product.log(), /"reason":"dedupd does not answer/);
    await pullAsUsual();
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
    await sleep(1_500); // The watch has looked at least once.
    assert.equal(existsSync(join(node.product.runDir, 'dedupd.sock')), false);
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);

    // One that somebody else starts is used.
    const child = run(DAEMON, ['--config', node.product.configFile], { timeoutMs: 60_000, allowFailure: true });
    await daemonAnswers();
    assert.match((await node.rpull(lazy)).stdout, /2 lazy/);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.collect();
    await node.product.stopDaemon();
    assert.equal((await child).code, 0);
  });

  for (const key of ['enable_lazy', 'enable_erofs'] as const) {
    test(`"${key}" false: no dedupd is started, every layer is ordinary, and the log says why`, async () => {
      await node.product.stopService();
      await node.product.stopDaemon();
      await node.product.configure({ [key]: false });
      await node.startService();
      assert.match((await node.rpull(lazy, [], { allowFailure: true })).stderr, new RegExp(`"${key}" is false`));
      await offerLayer();
      await pullAsUsual();
      assert.match(node.product.log(), new RegExp(`"reason":"\\\\"${key}\\\\" is false"`));
      assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
      assert.equal(existsSync(join(node.product.runDir, 'dedupd.sock')), false);
      await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    });
  }
});
