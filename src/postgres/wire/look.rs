//! What can be learned from a `postgres::Client` without asking its server anything: what has arrived by now, the end
//! of the connection above all.

use super::watch::Watch;
use ::postgres::Client;
use ::postgres::fallible_iterator::FallibleIterator;
use std::time::Duration;

/// How long a look may take in the worst case: when half a message has arrived, whose other half does not come.
const LONGEST_LOOK: Duration = Duration::from_millis(1);
/// How many notifications a look reads at most: more may come as long as it looks.
const MANY: usize = 1000;

/// Sends what `client` has queued but not yet written, without waiting for anything. A dropped statement or COPY leaves
/// such a message, and before it is written its [`Watch`] cannot know of it. It reads, once, what has arrived: not to
/// be called where that may be much. Notifications are dropped: they were for whoever used the client until now.
///
/// # Errors
///
/// If the connection is found dead. Success does not say that it is alive.
pub(in crate::postgres) fn flush(client: &mut Client) -> Result<(), ::postgres::Error> {
    drop_notifications(client);
    client.notifications().iter().next()?;
    drop_notifications(client);
    Ok(())
}

/// Drops the notifications that `client` has read. Looks for no others.
pub(in crate::postgres) fn drop_notifications(client: &mut Client) {
    while !client.notifications().is_empty() {
        // With a notification there it does not look at the stream.
        let _ = client.notifications().iter().next();
    }
}

/// Looks whether `client` is alive, as far as can be seen from here. Sends what it has queued, and drops the
/// notifications that have arrived. `Ok(false)`: it cannot be seen, or the stream has ended.
///
/// A `postgres::Client` reads what its runtime has learned from the system, and the runtime asks the system only when
/// it has nothing else to do, which is when a caller waits. So this waits for a notification, which the stream makes up
/// once there is nothing (more) to be read. Before that, the stream's first "nothing" wakes the runtime at once, which
/// makes it ask the system. All of that takes a few microseconds.
///
/// # Errors
///
/// If the connection is found dead.
pub(in crate::postgres) fn look(client: &mut Client, watch: &Watch) -> Result<bool, ::postgres::Error> {
    flush(client)?;
    if !watch.is_idle() {
        return Ok(false);
    }
    watch.probe.begin();
    let result = wait_for_the_made_up(client);
    watch.probe.end();
    Ok(result? && watch.is_idle())
}

fn wait_for_the_made_up(client: &mut Client) -> Result<bool, ::postgres::Error> {
    let mut notifications = client.notifications();
    let mut coming = notifications.timeout_iter(LONGEST_LOOK);
    for _ in 0..MANY {
        match coming.next()? {
            Some(notification) if notification.channel().is_empty() => return Ok(true),
            Some(_) => {}
            None => return Ok(false),
        }
    }
    Ok(false)
}
