// Entry point of `dedup-snapshotter`: checks the runtime, then hands over to the command line.
import { keepCompiledCode, requireSupportedNode } from './runtime.ts';

requireSupportedNode('dedup-snapshotter');
await keepCompiledCode();
const { runCommandLine } = await import('./cli/main.ts');
await runCommandLine(process.argv);
