// Entry point of `dedupd`: checks the runtime, then starts the data daemon in the foreground.
import { keepCompiledCode, requireSupportedNode } from './runtime.ts';

requireSupportedNode('dedupd');
await keepCompiledCode();
const { runDaemon } = await import('./fs/daemon.ts');
await runDaemon(process.argv);
