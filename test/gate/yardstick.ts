// The yardstick of processor time: the same bytes fetched, inflated, hashed and written by Node's own libraries. A program
// of its own, new for every use as the product's processes are; prints the seconds its passes took, fastest first.
//   node yardstick.ts FILE URL-OF-A-LAYER…      FILE is written and removed
import { createHash } from 'node:crypto';
import { closeSync, openSync, rmSync, writeSync } from 'node:fs';
import { Agent, get, type IncomingMessage } from 'node:http';
import { promisify } from 'node:util';
import { gunzip } from 'node:zlib';
import { MiB } from '../../src/units.ts';

const PASSES = 3;

const [file = '', ...urls] = process.argv.slice(2);
const agent = new Agent({ keepAlive: true });
const inflate = promisify(gunzip);

/** A blob in ranges of 1 MiB, one after the other. */
async function fetchBlob(url: string): Promise<Buffer> {
  const parts: Buffer[] = [];
  for (let offset = 0, size = 1; offset < size; offset += MiB) {
    const headers = { range: `bytes=${offset}-${offset + MiB - 1}` };
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      get(url, { agent, headers }, resolve).on('error', reject);
    });
    if (response.statusCode !== 206) throw new Error(`${url}: ${response.statusCode}`);
    size = Number(response.headers['content-range']?.split('/')[1]);
    for await (const part of response) parts.push(part as Buffer);
  }
  return Buffer.concat(parts);
}

async function pass(): Promise<void> {
  const fd = openSync(file, 'w');
  for (const url of urls) {
    const tar = await inflate(await fetchBlob(url), { chunkSize: MiB });
    for (let at = 0; at < tar.length; at += MiB) {
      const piece = tar.subarray(at, at + MiB);
      createHash('sha256').update(piece).digest();
      writeSync(fd, piece);
    }
  }
  closeSync(fd);
  rmSync(file);
}

const before = process.cpuUsage();
for (let i = 0; i < PASSES; i++) await pass();
const { user, system } = process.cpuUsage(before);
agent.destroy();
process.stdout.write(String((user + system) / 1e6));
