// Entry point of `dedupd`: checks the runtime, then starts the data daemon in the foreground, with pulls into containerd
// beside the data path, which knows nothing of them; or, when a verb is named, asks the daemon that runs.
import { keepCompiledCode, requireOpenFiles, requireSupportedNode } from './runtime.ts';

requireSupportedNode('dedupd');
const verb = process.argv.slice(2).find((word, at, all) => !word.startsWith('-') && all[at - 1] !== '--config');
if (verb === undefined) requireOpenFiles('dedupd');
await keepCompiledCode();
if (verb === undefined) {
  const { runDaemon } = await import('./fs/daemon.ts');
  const { imagePuller } = await import('./pull/image-puller.ts');
  const { containerdContent } = await import('./pull/containerd-content.ts');
  await runDaemon(process.argv, { imagePuller, localBlobs: containerdContent });
} else {
  const { runDedupdVerb } = await import('./cli/dedupd-verbs.ts');
  await runDedupdVerb(process.argv);
}
