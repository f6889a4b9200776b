// One large transfer over a link: a server at the far end, a client at the near end, both Node.js in processes of their
// own. Also the program that those processes run. For verifying the link; a registry's bytes are measured with a registry.
import { spawn } from 'node:child_process';
import { createCipheriv, createHash } from 'node:crypto';
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import type { Inside, Link } from './link.ts';

const PORT = 8000;
const BLOCK_BYTES = 1 << 20;

export interface Transfer {
  readonly bytes: number;
  readonly sha256: string;
  /** From before the connection until its end. */
  readonly durationMs: number;
  /** Bits of payload a second over the second half, when slow start is over. */
  readonly bitsPerSecond: number;
}

/** Bytes that differ everywhere, the same ones each time. */
function* blocks(bytes: number): Generator<Buffer> {
  const cipher = createCipheriv('aes-128-ctr', Buffer.alloc(16), Buffer.alloc(16));
  for (let left = bytes; left > 0; left -= BLOCK_BYTES) yield cipher.update(Buffer.alloc(Math.min(left, BLOCK_BYTES)));
}

/** Digest of what `transfer` must bring. */
export function transferDigest(bytes: number): string {
  const hash = createHash('sha256');
  for (const block of blocks(bytes)) hash.update(block);
  return hash.digest('hex');
}

/** Sends `bytes` from the far end to the near one. Errors: what the processes print. */
export async function transfer(link: Link, bytes: number): Promise<Transfer> {
  const server = start(link.far, ['serve', link.farAddress, String(bytes)]);
  try {
    await Promise.race([once(server.child.stdout, 'data'), server.output]);
    const client = start(link.near, ['fetch', link.farAddress]);
    return JSON.parse(await client.output) as Transfer;
  } finally {
    server.child.kill('SIGKILL');
    await server.output.catch(() => undefined);
  }
}

function start(inside: Inside, args: readonly string[]) {
  const words = [...inside.slice(1), process.execPath, fileURLToPath(import.meta.url), ...args];
  const child = spawn(inside[0], words, { stdio: ['ignore', 'pipe', 'pipe'], timeout: 60_000, killSignal: 'SIGKILL' });
  let [text, errors] = ['', ''];
  child.stdout.on('data', (data: Buffer) => (text += data.toString()));
  child.stderr.on('data', (data: Buffer) => (errors += data.toString()));
  const output = new Promise<string>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code, signal) =>
      code === 0 ? resolve(text) : reject(new Error(`${args.join(' ')} ended with ${code ?? signal}: ${errors}`)),
    );
  });
  output.catch(() => undefined); // the server's is looked at only when it fails to start
  return { child, output };
}

function serve(address: string, bytes: number): void {
  const server = createServer((socket: Socket) => void send(socket, bytes));
  server.listen(PORT, address, () => console.log('listening'));
}

async function send(socket: Socket, bytes: number): Promise<void> {
  for (const block of blocks(bytes)) if (!socket.write(block)) await once(socket, 'drain');
  socket.end();
}

async function fetchAll(address: string): Promise<Transfer> {
  const startedMs = performance.now();
  const socket = connect(PORT, address);
  const hash = createHash('sha256');
  const marks: { readonly ms: number; readonly bytes: number }[] = [];
  let bytes = 0;
  for await (const data of socket as AsyncIterable<Buffer>) {
    hash.update(data);
    bytes += data.length;
    marks.push({ ms: performance.now(), bytes });
  }
  const last = marks.at(-1)!;
  const half = marks.find((mark) => mark.bytes >= bytes / 2)!;
  return {
    bytes,
    sha256: hash.digest('hex'),
    durationMs: last.ms - startedMs,
    bitsPerSecond: ((last.bytes - half.bytes) * 8) / ((last.ms - half.ms) / 1000),
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [verb, address, bytes] = process.argv.slice(2);
  if (verb === 'serve') serve(address!, Number(bytes));
  else console.log(JSON.stringify(await fetchAll(address!)));
}
