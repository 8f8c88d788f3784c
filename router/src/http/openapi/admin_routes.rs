//! The admin API.

use serde_json::json;
use utoipa::openapi::path::HttpMethod::{Delete, Get, Post, Put};

use super::draft::{Access, Draft, Op};
use super::other_routes::LOADING;
use super::schemas::admin::{
    Adapter, AdapterPage, AdapterReport, Alias, AliasList, CacheReset, CacheResetRequest, Drained, PinRequest,
    PutAdapterRequest, PutAliasRequest, ServerInfo, Status, ValidateAdapterRequest,
};
use super::schemas::live::Live;
use super::{integer, one_of, text};
use crate::adapters::AdapterState;
use crate::http::error::Cause;

/// The tag of these routes.
pub(super) const TAG: &str = "Admin";

/// What adapters are sorted by.
const SORT: &str = "^-?(name|state|rank|bytes|residency|sequences|last_used)$";

/// Adds them.
pub(super) fn add(draft: &mut Draft<'_>) {
    adapters(draft);
    residency(draft);
    aliases(draft);
    let op = draft.op(Get, "/admin/v1/status", "adminStatus").tag(TAG).access(Access::Admin);
    op.says("What the server holds and does", "").reply::<Status>(200, "The status.").done();
    let op = draft.op(Get, "/admin/v1/live", "adminLive").tag(TAG).access(Access::Admin);
    op.says("What happens now", "Small enough to be asked once a second.")
        .in_query("since", integer().minimum(Some(0)).build(), "`next` of the answer before: only newer points.")
        .reply::<Live>(200, "Now, and the last minutes.")
        .done();
    let op = draft.op(Post, "/admin/v1/cache/reset", "adminCacheReset").admin();
    op.says("Empty caches", "Running requests keep what they use.")
        .body::<CacheResetRequest>(json!({"prefix": true}))
        .reply::<CacheReset>(200, "What was emptied.")
        .done();
    let op = draft.op(Get, "/server_info", "serverInfo").tag(TAG).access(Access::Admin);
    op.says("The server's settings", "").reply::<ServerInfo>(200, "The settings; secrets are `***`.").done();
    let says = "No new requests from now on; running ones finish; then the process ends.";
    let op = draft.op(Post, "/admin/v1/drain", "adminDrain").tag(TAG).access(Access::Admin);
    op.says("Stop", says).reply::<Drained>(200, "It drains.").done();
}

impl Op<'_, '_> {
    fn admin(self) -> Self {
        // Unknown parameters of the query are refused by name.
        self.tag(TAG).access(Access::Admin).refuses(&[Cause::UnsupportedParameter])
    }

    fn named(self) -> Self {
        self.in_path("name", "Percent-encoded; may hold `/`.")
    }

    fn of_namespace(self) -> Self {
        let namespace = text().pattern(Some("^[A-Za-z0-9._-]*$")).build();
        self.in_query("namespace", namespace, "Whose name is meant; absent: the shared ones.")
    }
}

fn adapters(draft: &mut Draft<'_>) {
    let reference = json!({"ref": "hf://org/sql-lora"});
    let states = AdapterState::ALL.map(AdapterState::name);
    draft
        .op(Get, "/admin/v1/adapters", "listAdapters")
        .admin()
        .says("List adapters", "All namespaces, by name.")
        .in_query("state", one_of(&states), "Only these.")
        .in_query("prefix", text().build(), "Only names that start so.")
        .in_query("namespace", text().pattern(Some("^[A-Za-z0-9._-]*$")).build(), "Only its names.")
        .in_query("limit", integer().minimum(Some(1)).maximum(Some(1000)).build(), "Of one page; 100 by default.")
        .in_query("after", text().build(), "`next` of the page before.")
        .in_query("contains", text().build(), "Only names that hold this; not with `prefix` and `after`.")
        .in_query("sort", text().pattern(Some(SORT)).build(), "By what; `-` in front: the largest first.")
        .in_query("offset", integer().minimum(Some(0)).build(), "How many to leave out.")
        .reply::<AdapterPage>(200, "A page.")
        .done();
    draft
        .op(Post, "/admin/v1/adapters/validate", "validateAdapter")
        .admin()
        .says("Check an adapter", "Reads its files and says whether it could serve. Nothing is registered.")
        .body::<ValidateAdapterRequest>(reference.clone())
        .reply::<AdapterReport>(200, "The report, also of a bad adapter.")
        .refuses(LOADING)
        .done();
    draft
        .op(Get, "/admin/v1/adapters/{name}", "getAdapter")
        .admin()
        .says("Show an adapter", "")
        .named()
        .of_namespace()
        .reply::<Adapter>(200, "The adapter.")
        .refuses(&[Cause::ModelNotFound])
        .done();
    draft
        .op(Put, "/admin/v1/adapters/{name}", "putAdapter")
        .admin()
        .says("Register and load an adapter", "A name that exists gets the new content once it is ready.")
        .named()
        .in_query(
            "wait",
            text().pattern(Some(r"^[0-9]{1,2}(\.[0-9]{1,3})?(ms|s)?$")).build(),
            "How long: `30s`, `500ms`.",
        )
        .body::<PutAdapterRequest>(reference)
        .reply::<Adapter>(200, "It can serve.")
        .reply::<Adapter>(202, "It is still loading.")
        .refuses(LOADING)
        .refuses(&[Cause::PreconditionFailed, Cause::SourceForbidden])
        .done();
    draft
        .op(Delete, "/admin/v1/adapters/{name}", "deleteAdapter")
        .admin()
        .says("Unload an adapter", "Its name is gone at once.")
        .named()
        .of_namespace()
        .in_query("mode", one_of(&["drain", "now"]), "`now`: running requests end with an error.")
        .in_query("purge", one_of(&["true", "false"]), "Take the files from the disk too.")
        .reply::<Adapter>(200, "As it was.")
        .refuses(&[Cause::ModelNotFound])
        .done();
}

fn residency(draft: &mut Draft<'_>) {
    let refusals = &[
        Cause::ModelNotFound,
        Cause::PreconditionFailed,
        Cause::AdapterInvalid,
        Cause::AdapterLoading,
        Cause::AdapterLoadFailed,
        Cause::QuotaExceeded,
    ];
    draft
        .op(Post, "/admin/v1/adapters/{name}/pin", "pinAdapter")
        .admin()
        .says("Keep an adapter in memory", "")
        .named()
        .of_namespace()
        .body::<PinRequest>(json!({"residency": "device"}))
        .reply::<Adapter>(200, "The adapter.")
        .refuses(refusals)
        .done();
    draft
        .op(Post, "/admin/v1/adapters/{name}/unpin", "unpinAdapter")
        .admin()
        .says("Let an adapter be evicted again", "")
        .named()
        .of_namespace()
        .reply::<Adapter>(200, "The adapter.")
        .refuses(refusals)
        .done();
}

fn aliases(draft: &mut Draft<'_>) {
    let op = draft.op(Get, "/admin/v1/aliases", "listAliases").admin().says("List aliases", "");
    op.reply::<AliasList>(200, "All of them.").done();
    draft
        .op(Get, "/admin/v1/aliases/{name}", "getAlias")
        .admin()
        .says("Show an alias", "")
        .named()
        .of_namespace()
        .reply::<Alias>(200, "The alias.")
        .refuses(&[Cause::ModelNotFound])
        .done();
    let stale = &[Cause::PreconditionFailed, Cause::AdapterExists, Cause::NameIsBaseModel, Cause::ModelNotFound];
    draft
        .op(Put, "/admin/v1/aliases/{name}", "putAlias")
        .admin()
        .says("Make or change an alias", "All versions in one step.")
        .named()
        .of_namespace()
        .body::<PutAliasRequest>(
            json!({"versions": [{"adapter": "sql-v1", "weight": 9}, {"adapter": "sql-v2", "weight": 1}]}),
        )
        .reply::<Alias>(200, "The alias.")
        .refuses(stale)
        .done();
    draft
        .op(Delete, "/admin/v1/aliases/{name}", "deleteAlias")
        .admin()
        .says("Take an alias away", "")
        .named()
        .of_namespace()
        .in_query("expected_version", integer().minimum(Some(0)).build(), "Go on only if the alias has this version.")
        .reply::<Alias>(200, "As it was.")
        .refuses(stale)
        .done();
    draft
        .op(Post, "/admin/v1/aliases/{name}/rollback", "rollbackAlias")
        .admin()
        .says("Take the last change of an alias back", "")
        .named()
        .of_namespace()
        .reply::<Alias>(200, "The alias.")
        .refuses(stale)
        .done();
}
