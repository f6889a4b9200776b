// Entry point of `dedup-snapshotter`: checks the runtime, then hands over to the command line.
import { requireSupportedNode } from './runtime.ts';

requireSupportedNode('dedup-snapshotter');
const { runCommandLine } = await import('./cli/main.ts');
await runCommandLine(process.argv);
