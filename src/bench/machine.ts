// Describes the machine beside the figures: they mean nothing without it.
import { cpus, release, totalmem } from 'node:os';
import { VERSION } from '../version.ts';
import { execute } from './node-commands.ts';
import type { Machine } from './result.ts';

const PROGRAMS: Readonly<Record<string, readonly string[]>> = {
  containerd: ['containerd', '--version'],
  runc: ['runc', '--version'],
};

export async function describeMachine(): Promise<Machine> {
  const versions: Record<string, string> = { 'dedup-snapshotter': VERSION, node: process.versions.node };
  for (const [name, command] of Object.entries(PROGRAMS)) {
    const text = await execute(command, { allowFailure: true });
    const version = /\d+\.\d+[\w.~+-]*/.exec(text)?.[0];
    if (version !== undefined) versions[name] = version;
  }
  return {
    cores: cpus().length,
    cpuModel: cpus()[0]?.model ?? 'unknown',
    memoryBytes: totalmem(),
    kernel: release(),
    versions,
  };
}
