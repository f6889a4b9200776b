// Entry point of `dedupd`: checks the runtime, then starts the data daemon in the foreground, with pulls into containerd
// beside the data path, which knows nothing of them.
import { keepCompiledCode, requireOpenFiles, requireSupportedNode } from './runtime.ts';

requireSupportedNode('dedupd');
requireOpenFiles('dedupd');
await keepCompiledCode();
const { runDaemon } = await import('./fs/daemon.ts');
const { imagePuller } = await import('./pull/image-puller.ts');
const { containerdContent } = await import('./pull/containerd-content.ts');
await runDaemon(process.argv, { imagePuller, localBlobs: containerdContent });
