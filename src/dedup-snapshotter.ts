// Entry point of `dedup-snapshotter`: checks the runtime, then hands over to the command line.
import { keepCompiledCode, requireOpenFiles, requireSupportedNode } from './runtime.ts';

requireSupportedNode('dedup-snapshotter');
requireOpenFiles('dedup-snapshotter');
await keepCompiledCode();
const { runCommandLine } = await import('./cli/main.ts');
await runCommandLine(process.argv);
