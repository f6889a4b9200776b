// Which containerd the tests meet (the one in PATH; `make compat` puts others there), and what differs between versions
// as far as tests care: syntax of the configuration, and what clients tell the snapshotter (docs/clients.md).
import { execFileSync } from 'node:child_process';

/** What a client tells of a layer: nothing; its annotations and `snapshot.ref`, but no image and no layer; or everything. */
export type Told = 'nothing' | 'annotations' | 'everything';

export interface ContainerdTraits {
  /** `version` of config.toml. */
  readonly config: 2 | 3;
  /** `ctr image pull`, when the plugin is configured without exports. */
  readonly ctrPull: Told;
  /** The same with `enable_remote_snapshot_annotations`; a version that does not know the key is never given it. */
  readonly ctrPullExported: Told;
  /** CRI with `disable_snapshot_annotations = false`. */
  readonly cri: Told;
  /** CRI with annotations off, and with the export where the version knows it. */
  readonly criWithoutAnnotations: Told;
}

/** From the version named on, until the next. */
const VERSIONS: readonly (readonly [from: readonly [number, number], ContainerdTraits])[] = [
  [
    [1, 6],
    { config: 2, ctrPull: 'nothing', ctrPullExported: 'nothing', cri: 'everything', criWithoutAnnotations: 'nothing' },
  ],
  [
    [2, 0],
    {
      config: 3,
      ctrPull: 'annotations',
      ctrPullExported: 'annotations',
      cri: 'everything',
      criWithoutAnnotations: 'annotations',
    },
  ],
  [
    [2, 1],
    {
      config: 3,
      ctrPull: 'annotations',
      ctrPullExported: 'everything',
      cri: 'everything',
      criWithoutAnnotations: 'everything',
    },
  ],
];

export interface ContainerdVersion extends ContainerdTraits {
  readonly number: readonly [major: number, minor: number];
  /** As the program says it. */
  readonly text: string;
}

let known: ContainerdVersion | undefined;

/** The containerd in PATH. Throws when there is none. */
export function containerdVersion(): ContainerdVersion {
  if (known !== undefined) return known;
  const said = execFileSync('containerd', ['--version'], { encoding: 'utf8', timeout: 10_000 });
  const [, text = '', major, minor] = / v?((\d+)\.(\d+)\.\S+)/.exec(said) ?? [];
  const number = [Number(major), Number(minor)] as const;
  const traits = VERSIONS.findLast(([from]) => isAtLeast(number, from))?.[1];
  if (traits === undefined) throw new Error(`no tests are made for this containerd: ${said}`);
  known = { number, text, ...traits };
  return known;
}

function isAtLeast(number: readonly [number, number], from: readonly [number, number]): boolean {
  return number[0] > from[0] || (number[0] === from[0] && number[1] >= from[1]);
}

/** True from 2.1 on, where a proxy plugin may ask the transfer service for labels. */
export function knowsExports(version: ContainerdVersion): boolean {
  return isAtLeast(version.number, [2, 1]);
}
