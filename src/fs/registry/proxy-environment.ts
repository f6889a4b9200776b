// Which proxy the environment names for a URL. Same rules as Go programs (containerd, runc's tools) follow, so that one
// setting in a unit file means the same for all of them.
import { BlockList, isIP } from 'node:net';

type Environment = Readonly<Record<string, string | undefined>>;

/**
 * The proxy's URL for `url` by HTTP_PROXY, HTTPS_PROXY and NO_PROXY (lower case wins), or undefined for a direct
 * connection. NO_PROXY holds names (also matching their subdomains), `.suffix`, addresses, CIDR blocks, each with an
 * optional port, and `*`.
 */
export function proxyFor(url: URL, env: Environment): string | undefined {
  const read = (name: string) => env[name.toLowerCase()] || env[name] || undefined;
  const proxy = url.protocol === 'https:' ? read('HTTPS_PROXY') : read('HTTP_PROXY');
  if (proxy === undefined) return undefined;
  const exceptions = (read('NO_PROXY') ?? '').split(/[,\s]+/).filter((entry) => entry !== '');
  if (exceptions.some((entry) => matches(entry.toLowerCase(), url))) return undefined;
  return proxy.includes('://') ? proxy : `http://${proxy}`;
}

function matches(entry: string, url: URL): boolean {
  if (entry === '*') return true;
  const host = url.hostname.toLowerCase().replace(/^\[(.*)\]$/, '$1');
  const port = url.port || (url.protocol === 'https:' ? '443' : '80');
  if (entry.includes('/')) return inBlock(entry, host);
  const split = /^(?:\[([^\]]+)\]|([^:]*))(?::(\d+))?$/.exec(entry);
  const name = split?.[1] ?? split?.[2] ?? entry;
  if (split?.[3] !== undefined && split[3] !== port) return false;
  const suffix = name.replace(/^\*?\./, '');
  if (name === suffix && host === name) return true;
  return host.endsWith(`.${suffix}`);
}

function inBlock(entry: string, host: string): boolean {
  const [network = '', bits = ''] = entry.split('/');
  const family = isIP(network);
  if (family === 0 || isIP(host) !== family || !/^\d{1,3}$/.test(bits)) return false;
  if (Number(bits) > (family === 4 ? 32 : 128)) return false;
  const type = family === 4 ? 'ipv4' : 'ipv6';
  const list = new BlockList();
  list.addSubnet(network, Number(bits), type);
  return list.check(host, type);
}
