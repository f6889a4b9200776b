// Measures the rate of one large transfer, in a process of its own that may run in another network namespace: prints
// bytes per second. The beginning, in which TCP finds the rate, does not count.
//   node test/bench/link-probe.ts URL BYTES
import { get as getPlain } from 'node:http';
import { get as getTls } from 'node:https';

const [url = '', bytes = '0'] = process.argv.slice(2);
/** Part of the transfer that is not counted. */
const OPENING = 0.3;

const get = url.startsWith('https:') ? getTls : getPlain;
get(url, { headers: { range: `bytes=0-${Number(bytes) - 1}` } }, (answer) => {
  if (answer.statusCode !== 206) throw new Error(`${url}: ${answer.statusCode}`);
  let received = 0;
  let from: { ms: number; bytes: number } | undefined;
  answer.on('data', (part: Buffer) => {
    received += part.length;
    if (from === undefined && received >= Number(bytes) * OPENING) from = { ms: performance.now(), bytes: received };
  });
  answer.on('end', () => {
    const seconds = (performance.now() - (from?.ms ?? 0)) / 1000;
    process.stdout.write(`${(received - (from?.bytes ?? 0)) / seconds}\n`);
  });
});
