// The config.toml of a test's containerd, in the syntax that its version reads (docs/clients.md says what each needs).
import { join } from 'node:path';
import type { TestContainerdOptions } from './containerd.ts';
import { type ContainerdVersion, knowsExports } from './containerd-version.ts';

/** Where one test's containerd keeps its things. */
export interface ContainerdPlaces {
  readonly dir: string;
  readonly root: string;
  readonly state: string;
  readonly address: string;
}

/** A TOML table: dotted name, then `key = value` lines. Values are JSON, which TOML reads for what is written here. */
type Table = readonly [name: string, values: Readonly<Record<string, unknown>>];

function tables(list: readonly Table[]): string[] {
  return list.flatMap(([name, values]) => [
    name,
    ...Object.entries(values).map(([key, value]) => `${key} = ${JSON.stringify(value)}`),
  ]);
}

/** Plugins that tests do without. */
const UNUSED = ['io.containerd.internal.v1.restart', 'io.containerd.internal.v1.tracing'];
const CRI = {
  2: ['io.containerd.grpc.v1.cri'],
  3: ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.grpc.v1.cri'],
} as const;

export function containerdConfig(
  places: ContainerdPlaces,
  options: TestContainerdOptions,
  version: ContainerdVersion,
): string {
  const disabled = [...UNUSED, ...(options.cri === undefined ? CRI[version.config] : [])];
  const { root, state } = places;
  const list: Table[] = [
    ['', { version: version.config, root, state, disabled_plugins: disabled }],
    ['[grpc]', { address: places.address }],
    ['[debug]', { level: 'debug' }],
    ['[plugins."io.containerd.internal.v1.opt"]', { path: join(places.dir, 'opt') }],
  ];
  if (version.config === 3) list.push(...transferTables(options));
  if (options.cri !== undefined) list.push(...criTables(places, options.cri, version));
  for (const [name, address] of Object.entries(options.proxies ?? {})) {
    list.push([`[proxy_plugins.${name}]`, { type: 'snapshot', address }]);
    if (knowsExports(version) && options.exports !== false) {
      list.push([`[proxy_plugins.${name}.exports]`, { enable_remote_snapshot_annotations: 'true' }]);
    }
  }
  const extra = options.extraConfig === undefined ? [] : [options.extraConfig];
  return `${[...tables(list), ...extra].join('\n').trimStart()}\n`;
}

/** The transfer service unpacks only into snapshotters that are listed; the list replaces containerd's own. */
function transferTables(options: TestContainerdOptions): Table[] {
  const arch = process.arch === 'x64' ? 'amd64' : process.arch;
  const unpack = ['overlayfs', ...Object.keys(options.proxies ?? {})].map(
    (snapshotter): Table => [
      '[[plugins."io.containerd.transfer.v1.local".unpack_config]]',
      { platform: `linux/${arch}`, snapshotter },
    ],
  );
  // Its socket has one place for the whole machine.
  return [...unpack, ['[plugins."io.containerd.nri.v1.nri"]', { disable: true }]];
}

function criTables(
  places: ContainerdPlaces,
  cri: NonNullable<TestContainerdOptions['cri']>,
  version: ContainerdVersion,
): Table[] {
  const { snapshotter, sandboxImage } = cri;
  const disable_snapshot_annotations = cri.annotations === false;
  // Without CAP_SYS_RESOURCE (some virtual machines) nobody may make itself less likely to be killed.
  const restrict_oom_score_adj = true;
  const cni = { conf_dir: join(places.dir, 'cni') };
  const sandbox = (key: string) => (sandboxImage === undefined ? {} : { [key]: sandboxImage });
  const stream_server_port = '0';
  const stats_collect_period = 1; // seconds between questions for Usage
  if (version.config === 2) {
    const name = 'plugins."io.containerd.grpc.v1.cri"';
    return [
      [`[${name}]`, { stream_server_port, restrict_oom_score_adj, stats_collect_period, ...sandbox('sandbox_image') }],
      [`[${name}.cni]`, cni],
      [`[${name}.containerd]`, { snapshotter, disable_snapshot_annotations }],
    ];
  }
  return [
    ['[plugins."io.containerd.grpc.v1.cri"]', { stream_server_port }],
    ['[plugins."io.containerd.cri.v1.runtime"]', { restrict_oom_score_adj }],
    ['[plugins."io.containerd.cri.v1.runtime".cni]', cni],
    ['[plugins."io.containerd.cri.v1.images"]', { snapshotter, disable_snapshot_annotations, stats_collect_period }],
    ['[plugins."io.containerd.cri.v1.images".pinned_images]', sandbox('sandbox')],
  ];
}
