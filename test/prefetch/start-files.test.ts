// What is fetched before a start: checked against the dynamic linker's own word on this machine's programs.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, realpathSync, statSync } from 'node:fs';
import { test } from 'node:test';
import { parseNeeds } from '../../src/prefetch/elf.ts';
import { startCommandOf } from '../../src/prefetch/image-start.ts';
import {
  fetchStartFiles,
  type StartCommand,
  type StartFetcher,
  type StartTree,
} from '../../src/prefetch/start-files.ts';
import { BLOCK_BYTES, MiB } from '../../src/units.ts';

const COMMAND: StartCommand = { entrypoint: [], cmd: [], env: ['PATH=/usr/bin:/bin'], workingDir: '/' };

/** Files at made-up addresses, 1 GiB apart, and a fetcher that notes what is asked for. */
class Node {
  readonly files = new Map<string, Buffer>();
  readonly fetched = new Map<string, number>();
  readonly failing = new Set<string>();

  get tree(): StartTree {
    return {
      file: (path, from = '') => {
        const name = this.resolve(path.startsWith('/') ? path : `${from}/${path}`);
        const bytes = name === undefined ? undefined : this.files.get(name);
        if (name === undefined || bytes === undefined) return undefined;
        const base = [...this.files.keys()].indexOf(name) * 2 ** 30;
        return {
          path: name.slice(1),
          size: bytes.length,
          ranges: (offset, length) => {
            const start = Math.floor(offset / BLOCK_BYTES) * BLOCK_BYTES;
            const end = Math.ceil(Math.min(bytes.length, offset + length) / BLOCK_BYTES) * BLOCK_BYTES;
            return [{ offset: base + start, length: end - start }];
          },
        };
      },
    };
  }

  resolve(path: string): string | undefined {
    return path.replace(/\/+/g, '/');
  }

  get fetcher(): StartFetcher {
    const bytesAt = (offset: number, length: number): Buffer => {
      const [name, bytes] = [...this.files][Math.floor(offset / 2 ** 30)]!;
      if (this.failing.has(name)) throw new Error(`${name} cannot be fetched`);
      this.fetched.set(name, (this.fetched.get(name) ?? 0) + length);
      const padded = Buffer.alloc(length);
      bytes.copy(padded, 0, offset % 2 ** 30, (offset % 2 ** 30) + length);
      return padded;
    };
    return {
      ensure: async (ranges) => void ranges.map(({ offset, length }) => bytesAt(offset, length)),
      read: async (ranges) => Buffer.concat(ranges.map(({ offset, length }) => bytesAt(offset, length))),
    };
  }
}

/** This machine's own files. */
class HostNode extends Node {
  override resolve(path: string): string | undefined {
    if (!existsSync(path) || !statSync(path).isFile()) return undefined;
    const real = realpathSync(path);
    if (!this.files.has(real)) this.files.set(real, readFileSync(real));
    return real;
  }
}

/** What the dynamic linker of this machine would load. */
function loadedBy(program: string): string[] {
  const lines = execFileSync('ldd', [program], { encoding: 'utf8' }).split('\n');
  const paths = lines.map((line) => /(\/\S+) \(0x/.exec(line)?.[1]).filter((path) => path !== undefined);
  return paths.map((path) => realpathSync(path));
}

for (const program of ['bash', 'git', 'python3', 'ssh'].filter((name) => existsSync(`/usr/bin/${name}`))) {
  test(`everything that the dynamic linker loads for ${program} is fetched`, async () => {
    const node = new HostNode();
    await fetchStartFiles(node.tree, { ...COMMAND, cmd: [program] }, node.fetcher);
    const expected = [realpathSync(`/usr/bin/${program}`), ...loadedBy(`/usr/bin/${program}`)];
    assert.ok(expected.length > 2, 'it is linked dynamically');
    for (const path of [...expected, '/etc/passwd', '/etc/group'])
      assert.ok(node.fetched.has(path), `${path} among ${[...node.fetched.keys()].join(' ')}`);
  });
}

test('a script brings its interpreter, and what env(1) looks up', async () => {
  const node = new HostNode();
  node.files.set('/app/start.sh', Buffer.from('#!/usr/bin/env bash\nexec "$@"\n'));
  const resolve = node.resolve.bind(node);
  node.resolve = (path) => (path === '/app/start.sh' ? path : resolve(path));
  const command = { ...COMMAND, entrypoint: ['/app/start.sh'], cmd: ['cat', '/etc/hostname'] };
  await fetchStartFiles(node.tree, command, node.fetcher);
  for (const path of ['/usr/bin/env', '/usr/bin/bash', '/usr/bin/cat'])
    assert.ok(node.fetched.has(realpathSync(path)), path);
});

test('of a large program only its beginning and what is relocated is fetched', async () => {
  const node = new HostNode();
  const large = realpathSync(process.execPath);
  await fetchStartFiles(node.tree, { ...COMMAND, cmd: [large] }, node.fetcher);
  const { size } = statSync(large);
  const fetched = node.fetched.get(large) ?? 0;
  assert.ok(size > 20 * MiB && fetched >= 2 * MiB && fetched < size / 2, `${fetched} of ${size}`);
});

test('a file that cannot be fetched leaves the others alone, and nothing is rejected unseen', async () => {
  for (const failing of ['/etc/passwd', '/usr/bin/bash', '/lib64/ld-linux-x86-64.so.2'].filter((path) =>
    existsSync(path),
  )) {
    const node = new HostNode();
    node.failing.add(realpathSync(failing));
    await fetchStartFiles(node.tree, { ...COMMAND, cmd: ['bash'] }, node.fetcher);
    assert.ok(node.fetched.has(realpathSync('/etc/group')));
    assert.equal(node.fetched.has(realpathSync('/usr/bin/bash')), failing !== '/usr/bin/bash');
  }
});

test('files that are no ELF files, damaged or endless chains end quietly', async () => {
  const node = new Node();
  const elf = Buffer.from(readFileSync(realpathSync('/usr/bin/bash')).subarray(0, 5000));
  node.files.set('/cut', elf);
  node.files.set('/text', Buffer.from('hello'));
  node.files.set('/self', Buffer.from('#!/self\n'));
  node.files.set('/empty', Buffer.alloc(0));
  for (const word of ['/cut', '/text', '/self', '/empty', '/nowhere'])
    await fetchStartFiles(node.tree, { ...COMMAND, cmd: [word] }, node.fetcher);
  assert.ok(node.fetched.has('/self'));
});

test('a hostile library list is cut short', () => {
  const strings = Buffer.alloc(1 << 20, 'a');
  const dynamic = Buffer.alloc(16 * 4096);
  for (let i = 0; i < 4095; i++) dynamic.writeBigUInt64LE(1n, 16 * i); // DT_NEEDED at offset 0, which has no end
  assert.deepEqual(parseNeeds(dynamic, strings).libraries, []);
  strings[100] = 0;
  assert.equal(parseNeeds(dynamic, strings).libraries.length, 200);
});

test('a command of any length is looked at for so long only', async () => {
  let lookUps = 0;
  const tree: StartTree = {
    file: () => {
      lookUps++;
      return undefined;
    },
  };
  const cmd = Array.from({ length: 100_000 }, (_, i) => `/word${i}`);
  const env = [`PATH=${'/x:'.repeat(100_000)}`];
  await fetchStartFiles(tree, { entrypoint: ['program'], cmd, env, workingDir: '' }, new Node().fetcher);
  assert.ok(lookUps <= 2000, `${lookUps}`);
});

test('damaged metadata ends it quietly', async () => {
  const tree: StartTree = {
    file: () => {
      throw new Error('cut off');
    },
  };
  assert.deepEqual(await fetchStartFiles(tree, { ...COMMAND, cmd: ['bash'] }, new Node().fetcher), {
    files: 0,
    bytes: 0,
  });
});

test('names of a command are bytes', () => {
  const config = Buffer.from(JSON.stringify({ config: { Cmd: ['/opt/gr\u00fc\u00df'], Env: null } }));
  const { cmd, env } = startCommandOf(config);
  assert.deepEqual(cmd, [Buffer.from('/opt/grüß').toString('latin1')]);
  assert.deepEqual(env, []);
});
