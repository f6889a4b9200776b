// containerd's own suite for snapshotters, run over the socket of a dedup-snapshotter that is started for each subtest on
// a root of its own. Built and run by conformance.test.ts; DEDUP_PROGRAM names bin/dedup-snapshotter.
package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

const startTimeout = 30 * time.Second

// start runs the service on root; the second result ends it.
func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	// Sockets have short names only.
	run, err := os.MkdirTemp("", "conf-")
	if err != nil {
		return nil, nil, err
	}
	address := filepath.Join(run, "s")
	config, err := json.Marshal(map[string]any{
		"root": root, "address": address, "run_dir": filepath.Join(run, "r"), "log_dir": run,
		// Ordinary layers only: the suite has no lazy ones.
		"enable_lazy": false,
	})
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(run, "config.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, nil, err
	}
	log, err := os.Create(filepath.Join(run, "log"))
	if err != nil {
		return nil, nil, err
	}
	service := exec.Command(os.Getenv("DEDUP_PROGRAM"), "--config", file)
	service.Stdout, service.Stderr = log, log
	if err := service.Start(); err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- service.Wait() }()
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", address)
		if err == nil {
			conn.Close()
			break
		}
		select {
		case err := <-ended:
			said, _ := os.ReadFile(log.Name())
			return nil, nil, fmt.Errorf("the service ended: %v\n%s", err, said)
		default:
		}
		if time.Now().After(deadline) {
			service.Process.Kill()
			return nil, nil, fmt.Errorf("the service did not listen on %s within %s", address, startTimeout)
		}
	}
	conn, err := grpc.Dial("unix:"+address, grpc.WithInsecure())
	if err != nil {
		service.Process.Kill()
		return nil, nil, err
	}
	stop := func() error {
		conn.Close()
		service.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-ended:
			log.Close()
			os.RemoveAll(run)
			return err
		case <-time.After(startTimeout):
			service.Process.Kill()
			return fmt.Errorf("the service did not end within %s of SIGTERM", startTimeout)
		}
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "dedup"), stop, nil
}

// TestSnapshotter runs under the name overlayfs: the suite leaves out, by name, what no overlay can do.
func TestSnapshotter(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", start)
}
